"""Kernel modules out of a package: which ones a set needs, and the index that `modprobe` reads.

depmod isn't on every machine, and a module itself says what it needs: `depends=` and `alias=` in its `.modinfo`.
"""

import lzma
import re
from pathlib import Path

from atoll.errors import BuildFailed, ProcessFailed
from atoll.host import process

_FIELD = re.compile(rb"(?:^|\0)(depends|alias)=([^\0]*)(?=\0)")
_SIGNATURE_MARK = b"~Module signature appended~\n"


async def read_module(path: Path) -> bytes:
    """A module, decompressed. Raises `BuildFailed`."""
    content = path.read_bytes()
    try:
        if path.suffix == ".xz":
            return lzma.decompress(content)
        if path.suffix == ".zst":
            return (await process.run(["zstd", "-dcq"], stdin=content)).stdout
    except (lzma.LZMAError, ProcessFailed) as error:
        raise BuildFailed(f"the kernel module {path.name} can't be decompressed", str(error)) from error
    return content


def without_signature(module: bytes) -> bytes:
    """The module without the signature that is appended to it.

    Its check costs the guest more than loading the module, and nothing here asks for it. The signature ends in a
    12-byte descriptor, whose last four bytes are its length (include/linux/module_signature.h), and the mark.
    """
    if not module.endswith(_SIGNATURE_MARK):
        return module
    end = len(module) - len(_SIGNATURE_MARK)
    length = int.from_bytes(module[end - 4 : end], "big")
    return module[: end - 12 - length]


class ModuleSet:
    """Modules by name with all that they need, in an order in which they can be loaded."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self.contents: dict[str, bytes] = {}
        self._needs: dict[str, list[str]] = {}

    async def add(self, name: str) -> None:
        """Add a module after those it needs. One that isn't there (built in, or left out) is passed over."""
        if name in self.contents or name not in self._files:
            return
        content = without_signature(await read_module(self._files[name]))
        depends = [value.decode() for key, value in _FIELD.findall(content) if key == b"depends"]
        self._needs[name] = [need.replace("-", "_") for need in depends[0].split(",")] if depends and depends[0] else []
        for need in self._needs[name]:
            await self.add(need)
        self.contents[name] = content

    def index(self) -> dict[str, str]:
        """The contents of `modules.dep` and `modules.alias`, as modules.dep(5) tells."""
        dependencies, aliases = [], []
        for name in sorted(self.contents):
            needs = " ".join(f"{need}.ko" for need in self._all_needs(name))
            dependencies.append(f"{name}.ko: {needs}".rstrip())
            for key, value in _FIELD.findall(self.contents[name]):
                if key == b"alias":
                    aliases.append(f"alias {value.decode()} {name}")
        return {"modules.dep": _lines(dependencies), "modules.alias": _lines(aliases), "modules.symbols": ""}

    def _all_needs(self, name: str) -> list[str]:
        found: list[str] = []
        for need in self._needs[name]:
            for each in (need, *(self._all_needs(need) if need in self._needs else ())):
                if each not in found and each in self.contents:
                    found.append(each)
        return found


def find_modules(folder: Path) -> dict[str, Path]:
    """The module files under `folder` by the module's name (`virtio_blk`)."""
    paths = sorted(path for path in folder.rglob("*.ko*") if path.suffix in (".ko", ".xz", ".zst"))
    return {path.name.split(".ko")[0].replace("-", "_"): path for path in paths}


def _lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
