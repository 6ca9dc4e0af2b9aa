"""What outlives a call."""

from .defect import Defect

PREFIX = ("tests/test_prefix.py",)

DEFECTS = [
    Defect(
        "a chunk that was computed goes on unencoded",
        "kvplug/prefix.py",
        "        layer.sealing = True\n",
        "        layer.sealing = False\n",
        (*PREFIX, "-k", "warm and one and device"),
    ),
    Defect(
        "all of a prompt comes from the store",
        "kvplug/prefix.py",
        "length - self.first - self.tail)",
        "length - self.first)",
        (*PREFIX, "-k", "turn"),
    ),
    Defect(
        "tenants share their chunks",
        "kvplug/prefix.py",
        "self.chunk, reuse.salt, reuse.verify",
        'self.chunk, "", reuse.verify',
        (*PREFIX, "-k", "tenants"),
    ),
    Defect(
        "chunks are found behind other first tokens",
        "kvplug/prefix.py",
        "begin[0] if begin else self.root, row",
        "self.root, row",
        (*PREFIX, "-k", "first_token"),
    ),
    Defect(
        "each chunk begins at position 0",
        "kvplug/prefix.py",
        "torch.arange(a, b, device",
        "torch.arange(0, b - a, device",
        (*PREFIX, "-k", "turn"),
    ),
    Defect(
        "a mask with holes is served",
        "kvplug/prefix.py",
        "(mask.diff(dim=-1) < 0).any() or ",
        "",
        (*PREFIX, "-k", "does_not_serve"),
    ),
    Defect(
        "tensors of a chunk are read by their place",
        "kvplug/prefix.py",
        "own = {name: x[j] for name, x in of_these.items()}",
        "own = {name: x[j] for name, x in zip(sorted(of_these), of_these.values())}",
        ("tests/store/test_store_calls.py", "-k", "place"),
    ),
    Defect(
        "a record under another's name is taken for it",
        "kvplug/store/record.py",
        "    if inside != key:\n",
        "    if inside is None:\n",
        ("tests/store/test_store_record.py", "tests/store/test_store_failures.py"),
    ),
    Defect(
        "a record of another format is read",
        "kvplug/store/record.py",
        "    if magic != MAGIC:\n",
        "    if magic is None:\n",
        ("tests/store/test_store_record.py",),
    ),
    Defect(
        "a key leaves out the chunks before",
        "kvplug/store/keys.py",
        "link = hashlib.sha256(last)",
        "link = hashlib.sha256(root)",
        ("tests/store/test_store_keys.py",),
    ),
    Defect(
        "weights that change in place keep their digest",
        "kvplug/store/weights.py",
        "-1 if x.is_inference() else x._version",
        "-1",
        ("tests/store/test_store_keys.py",),
    ),
    Defect(
        "the first of a chain is evicted first",
        "kvplug/store/index.py",
        "last + len(chain) - i, hits, key",
        "last + 1 + i, hits, key",
        ("tests/store/test_store_bounds.py",),
    ),
    Defect(
        "what is written anew stays on the disk meanwhile",
        "kvplug/store/index.py",
        "drop([*gone, *old])",
        "drop(gone)",
        ("tests/store/test_store_bounds.py", "-k", "anew_leaves"),
    ),
    Defect(
        "a salt is not in the root",
        "kvplug/store/keys.py",
        "    return tag(salt) + hashlib",
        "    return tag('') + hashlib",
        ("tests/store/test_store_keys.py",),
    ),
]
