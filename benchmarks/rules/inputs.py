"""Rules for inputs that nobody vouches for: what is read is regular, bounded, and refused in a line."""

from benchmarks.rules.mutation import Mutation

FILES = "tests/untrusted/test_untrusted_files.py"
NUMBERS = "tests/config/test_limits.py"

FIRST = [
    Mutation(
        "a pipe or device is not read as a file",
        "dsv3.untrusted_files:_require_regular",
        "stat.S_ISREG(status.st_mode)",
        "True",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "a file is refused beyond the bytes of its kind",
        "dsv3.untrusted_files:read_bytes",
        "max(size, len(content)) > limit",
        "False",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "an alias of YAML counts as often as it is used",
        "dsv3.untrusted_files:_BoundedLoader.compose_node",
        "self.anchored.get(event.anchor, self.limits.nodes + 1)",
        "1",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "JSON is nested only so deep",
        "dsv3.untrusted_files:parse_json",
        "_require_depth(value, limits.depth, path)",
        "None",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "a list of a config has so many values at most",
        "dsv3.config.limits:require_within",
        "len(numbers) > ITEMS",
        "False",
        "tests/config/test_limits.py",
    ),
    Mutation(
        "an archive of a tensor is not compressed",
        "dsv3.checkpoint.tensor_archive:_entry",
        "method != 0 or size != packed",
        "False",
        "tests/checkpoint/test_tensor_archive.py",
    ),
    Mutation(
        "a put of a pickle goes to the next place",
        "dsv3.checkpoint.metadata_pickle:_put",
        "place < len(memo)",
        "True",
        "tests/checkpoint/test_metadata_pickle.py",
    ),
    Mutation(
        "a preset that Hydra reads is bounded",
        "dsv3.config.preset_source:FileConfigSource.load_config",
        "require_bounded_yaml($path)",
        "None",
        "tests/untrusted/test_entrances.py",
    ),
]

RULES = [
    Mutation(
        "files: a pipe that has taken a file's place is refused",
        "dsv3.untrusted_files:open_descriptor",
        "_require_regular(path, os.fstat(descriptor))",
        "None",
        FILES,
    ),
    Mutation(
        "files: no more is read than the limit and a byte",
        "dsv3.untrusted_files:read_bytes",
        "file.read(limit + 1)",
        "file.read()",
        FILES,
    ),
    Mutation(
        "files: values of JSON are counted before they are made",
        "dsv3.untrusted_files:parse_json",
        "sum(map(text.count, ',[{:')) > limits.nodes",
        "False",
        FILES,
    ),
    Mutation(
        "files: a number of JSON has so many digits at most",
        "dsv3.untrusted_files:_whole_number",
        "len(digits) > LONGEST_NUMBER",
        "False",
        FILES,
    ),
    Mutation(
        "files: a number of YAML has so many digits at most",
        "dsv3.untrusted_files:_BoundedLoader.compose_node",
        "len(node.value) > LONGEST_NUMBER",
        "False",
        FILES,
    ),
    Mutation(
        "files: YAML is nested only so deep",
        "dsv3.untrusted_files:_BoundedLoader.compose_node",
        "self.depth > self.limits.depth",
        "False",
        FILES,
    ),
    Mutation(
        "files: values of YAML are counted",
        "dsv3.untrusted_files:_BoundedLoader._count",
        "self.nodes > self.limits.nodes",
        "False",
        FILES,
    ),
    Mutation(
        "files: a key that comes twice is refused",
        "dsv3.untrusted_files:_unique_keys",
        "len(found) < len(pairs)",
        "False",
        FILES,
    ),
    Mutation(
        "files: a name cannot steer a terminal",
        "dsv3.untrusted_files:BadFile.__init__",
        "char if char.isprintable() else '\\ufffd'",
        "char",
        FILES,
    ),
    Mutation(
        "files: another reader gets no YAML beyond the limits",
        "dsv3.untrusted_files:require_bounded_yaml",
        "raise _no_yaml(error, path) from None",
        "return",
        FILES,
    ),
    Mutation(
        "files: nothing is appended to a pipe in a run directory",
        "dsv3.untrusted_files:require_no_pipes",
        "_require_regular(entry.path, entry.stat())",
        "None",
        "tests/untrusted/test_entrances.py -k nothing_can_be_written",
    ),
    Mutation(
        "limits: they count below zero too",
        "dsv3.config.limits:require_within",
        "-limit <= number <= limit",
        "number <= limit",
        f"{NUMBERS} -k both_ways",
    ),
    Mutation(
        "limits: numbers in a list count",
        "dsv3.config.limits:require_within",
        "value if isinstance(value, list | tuple) else [value]",
        "[value]",
        f"{NUMBERS} -k both_ways",
    ),
    Mutation(
        "limits: whole numbers that floats count exactly",
        "dsv3.config.limits:most",
        "WHOLE if kind is int else REAL",
        "REAL",
        f"{NUMBERS} -k both_ways",
    ),
    Mutation(
        "limits: typed numbers are compared with the table",
        "dsv3.config.strict",
        "require_within(type(node), field.name, key, value)",
        "None",
        f"{NUMBERS} -k typed_numbers",
    ),
    Mutation(
        "limits: layers and experts are bounded together",
        "dsv3.config.model",
        "EXPERTS // max(self.num_moe_layers, 1)",
        "EXPERTS",
        f"{NUMBERS} -k bounded_together",
    ),
]
