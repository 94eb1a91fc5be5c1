"""docs/reference/ says what the code says."""

from docs import reference

from atoll.platform import api


def test_the_reference_is_up_to_date() -> None:
    for name, content in reference.pages().items():
        written = (reference.FOLDER / name).read_text()
        assert written == content, f"docs/reference/{name} is out of date: run `./dev docs`"


def test_each_method_of_the_sdk_is_explained() -> None:
    for each in (api.AsyncHost, api.AsyncVm, api.AsyncImages, api.AsyncNetworks, api.AsyncGroups, api.AsyncOperations):
        silent = [name for name, member in vars(each).items() if not name.startswith("_") and callable(member)]
        assert not [name for name in silent if not getattr(each, name).__doc__], each.__name__
