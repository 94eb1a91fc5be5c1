"""libvirt's Python binding, for the system's own Python, which alone has it: `bindings.py URI PREFIX TIMES`; JSON.

Milliseconds of listing all domains with their states over a connection that is open: by one call that asks for the
states of all, and by a call for each domain, as most programs do.
"""

import json
import sys
import time

import libvirt  # type: ignore[import-not-found]


def main() -> None:
    uri, prefix, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
    connection = libvirt.openReadOnly(uri)

    def at_once() -> list[tuple[str, object]]:
        found = connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE)
        return [(domain.name(), stats["state.state"]) for domain, stats in found]

    def one_by_one() -> list[tuple[str, object]]:
        return [(domain.name(), domain.state()[0]) for domain in connection.listAllDomains()]

    took: dict[str, list[float]] = {}
    for name, listing in (("at once", at_once), ("one by one", one_by_one)):
        for _ in range(times):
            began = time.perf_counter()
            found = listing()
            took.setdefault(name, []).append(1000 * (time.perf_counter() - began))
        count = sum(each.startswith(prefix) for each, _ in found)
    print(json.dumps({"count": count, "took": took}))


if __name__ == "__main__":
    main()
