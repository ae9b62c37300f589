"""Check the tensors of an HF checkpoint against the model that is to hold them, by their headers alone.

Names, shapes, dtypes and scale grids are compared before a value is read. 671b has 91,000 tensors, which take
about a second.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3.config.convergence import shown
from dsv3.config.model import ModelConfig
from dsv3.config.model_difference import model_differences
from dsv3.errors import UserError, quoted
from dsv3.hf.config_json import read_hf_model
from dsv3.hf.config_values import HFValues
from dsv3.hf.names import SCALE_SUFFIX, HFTensor, is_derived, is_mtp_module, layer_number, mtp_duplicates
from dsv3.hf.other_architectures import other_tensor
from dsv3.hf.pread_file import fault
from dsv3.hf.safetensors_header import TensorInfo

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights may have beside block-fp8."""

SCALE_DTYPES = (*VALUE_DTYPES, torch.float8_e8m0fnu)
"""Dtypes that scales may have; E8M0 holds the powers of two of ue8m0."""

_PADDED = ("embedding.weight", "head.weight")
"""Parameters whose rows are padded to a round number by programs that train with tensor parallelism."""

_NO_MTP = "model.mtp_depths=0 leaves it out"


@dataclass(frozen=True)
class TensorCheck:
    """The tensors of a checkpoint and the model that is to hold them."""

    directory: Path
    config_json: HFValues
    stored: dict[str, TensorInfo]
    block: tuple[int, int]
    """Rows and columns of a weight that share a scale."""
    config: ModelConfig
    layout: list[HFTensor]

    def run(self) -> Iterator[str]:
        """Check everything; yield lines on what differs from a release and is read all the same.

        UserError names the first tensor that is missing, misshapen, of a dtype that is not supported, of
        another architecture, or has no place in the model.
        """
        for name, entry in self.stored.items():
            if reason := other_tensor(name):
                raise fault(entry.file, f"has {quoted(name)}, {reason}")
        source = self._model_source()
        self._require_counts()
        self._require_mtp_layers()
        padded = []
        for tensor in self.layout:
            if tensor.name not in self.stored:
                raise self._missing(tensor.name, source)
            if self._is_padded(tensor):
                padded.append(tensor)
            else:
                _require_shape(self.stored[tensor.name], tensor, source)
            self._require_dtype(tensor)
        self._refuse_left_over(source)
        yield from self._notes(padded)

    def _require_mtp_layers(self) -> None:
        """Raise UserError unless there is something of every MTP layer of the model."""
        for depth in range(self.config.mtp_depths):
            first = f"model.layers.{self.config.num_layers + depth}."
            if not any(name.startswith(first) for name in self.stored):
                missing = f"has no '{first}enorm.weight', nor anything else of that MTP layer"
                raise fault(self.directory, f"{missing}: {_NO_MTP}")

    def _model_source(self) -> tuple[str, str]:
        """Return what sets the model's numbers: its config.json, or the command with the fix."""
        try:
            own, _ = read_hf_model(self.directory)
        except UserError:
            return "the configured model", ""
        found = [each for each in model_differences(own, self.config) if each.key != "model.mtp_depths"]
        changed = [f"{each.key}={shown(each.b)}" for each in found]
        if not changed:
            return "its config.json", ""
        return "the configured model", f": leave {' '.join(changed)} out"

    def _missing(self, name: str, source: tuple[str, str]) -> UserError:
        """Return the error that a tensor of the model is not there; `source` as of `_model_source`."""
        if layer_number(name) in self._mtp_modules():
            text = f"has no tensor '{name}', though others of that MTP layer are there: {_NO_MTP}"
            return fault(self.directory, text)
        return fault(self.directory, f"has no tensor '{name}', which {source[0]} asks for{source[1]}")

    def _is_padded(self, tensor: HFTensor) -> bool:
        """Return whether a tensor has rows behind the vocabulary that config.json gives the model."""
        entry = self.stored[tensor.name]
        return (
            tensor.parameter in _PADDED
            and self.config.vocab_size == self.config_json.values.get("vocab_size")
            and len(entry.shape) == 2
            and entry.shape[0] > tensor.shape[0]
            and entry.shape[1] == tensor.shape[1]
        )

    def _refuse_left_over(self, source: tuple[str, str]) -> None:
        """Raise UserError for a tensor that the model has no place for; MTP layers may be left out.

        `source` is as of `_model_source`.
        """
        model = "the model of its config.json" if source[0] == "its config.json" else source[0]
        allowed = {tensor.name for tensor in self.layout} | set(mtp_duplicates(self.config))
        for name, entry in self.stored.items():
            weight = name.removesuffix(SCALE_SUFFIX)
            has_scales = weight in allowed and weight in self.stored and is_fp8(self.stored[weight])
            if not (name in allowed or has_scales or is_derived(name, self.config)):
                raise fault(entry.file, f"has {quoted(name)}, for which {model} has no place{source[1]}")
        for name, original in mtp_duplicates(self.config).items():
            copy = self.stored.get(name)
            if copy is not None and copy.shape != self.stored[original].shape:
                text = (
                    f"has {quoted(name)} of shape {list(copy.shape)}, which is to be a copy of '{original}'"
                )
                raise fault(copy.file, f"{text} of shape {list(self.stored[original].shape)}: {_NO_MTP}")
            if copy is not None:
                self._require_dtype(HFTensor(name, copy.shape, "", (), ()))

    def _mtp_modules(self) -> dict[int, str]:
        """Return a tensor of each stored layer that MTP layers alone have, by the layer's number."""
        return {layer_number(name): name for name in self.stored if is_mtp_module(name)}

    def _require_counts(self) -> None:
        """Raise UserError unless main layers come first, as many as are counted, and MTP layers behind them.

        A config.json that was cut by hand would otherwise drop main layers in silence. The last ones may be
        left out where the model has fewer than config.json: the command has asked for that by name.
        """
        main, mtp, alias = (
            count if isinstance(count := self.config_json.values.get(f"num_{kind}_layers"), int) else 0
            for kind in ("hidden", "nextn_predict", "mtp")
        )
        here, of_mtp = self.config.num_layers, self._mtp_modules()
        put_back = "put back its num_hidden_layers"
        if of_mtp and (first := min(of_mtp)) < here:
            text = f"has {quoted(of_mtp[first])}, of an MTP layer, which "
            if here > main:
                text += f"model.num_layers={here} counts as a main layer: leave model.num_layers={here} out"
            else:
                text += f"its config.json counts among its {main} layers: {put_back}"
            raise fault(self.stored[of_mtp[first]].file, text)
        counted = main + (mtp or alias) if here < main else here
        layers = {layer_number(name): name for name in self.stored}
        behind = [number for number in layers if number >= counted and number not in of_mtp]
        if behind:
            name = layers[min(behind)]
            text = f"has {quoted(name)}, but its config.json counts {main} layers"
            fix = f"{put_back}; model.num_layers=N then takes the first N"
            raise fault(self.stored[name].file, f"{text}: {fix}")

    def _require_dtype(self, tensor: HFTensor) -> None:
        """Raise UserError unless a tensor has a supported dtype and, in fp8, its scales."""
        entry, scales = self.stored[tensor.name], self.stored.get(tensor.name + SCALE_SUFFIX)
        name = quoted(tensor.name)
        if is_fp8(entry):
            if scales is None:
                raise fault(
                    entry.file, f"has {name} in fp8, but no scales '{tensor.name + SCALE_SUFFIX}' are there"
                )
            if len(entry.shape) != 2:
                raise fault(
                    entry.file, f"has {name} in fp8, of shape {list(entry.shape)}: blocks need a matrix"
                )
            grid = [-(-length // side) for length, side in zip(entry.shape, self.block, strict=True)]
            if list(scales.shape) != grid:
                what = f"the weight's {list(entry.shape)} in blocks of {list(self.block)} needs {grid}"
                if self.config_json.values.get("quantization_config") is None:
                    what += ": config.json has no quantization_config with weight_block_size, so "
                    what += "{} x {} was assumed".format(*self.block)
                raise fault(scales.file, f"has {quoted(scales.name)} of shape {list(scales.shape)}, {what}")
            if scales.dtype not in SCALE_DTYPES:
                known = "float32, bfloat16, float16 and float8_e8m0fnu"
                raise fault(scales.file, f"has {quoted(scales.name)} of {scales.dtype}; supported: {known}")
        elif entry.dtype not in VALUE_DTYPES:
            known = "float32, bfloat16, float16 and float8_e4m3fn"
            raise fault(entry.file, f"has {name} of {entry.dtype}; supported: {known}")
        elif scales is not None:
            raise fault(
                scales.file, f"has {quoted(scales.name)}, but its weight is of {entry.dtype}, not fp8"
            )

    def _notes(self, padded: Iterable[HFTensor]) -> Iterator[str]:
        for tensor in padded:
            rows, kept = self.stored[tensor.name].shape[0], tensor.shape[0]
            padding = f"{rows - kept:,} are padding and are left out"
            yield f"'{tensor.name}' has {rows:,} rows for a vocabulary of {kept:,}: {padding}"
        duplicates = mtp_duplicates(self.config)
        missing = [name for name in duplicates if name not in self.stored]
        if 0 < len(missing) < len(duplicates):
            told = f"no '{missing[0]}' ({len(missing)} of {len(duplicates)} duplicates of MTP layers)"
            yield f"{self.directory} has {told}: an export writes '{duplicates[missing[0]]}' for it"
        quantized = self.config_json.values.get("quantization_config")
        if quantized and not any(is_fp8(self.stored[tensor.name]) for tensor in self.layout):
            what = "has a quantization_config of fp8, but its weights are not in fp8"
            yield f"{self.config_json.file} {what}: they are read as they are stored"
        try:
            _, unknown = read_hf_model(self.directory)
        except UserError:  # the model was given on the command line
            return
        if unknown:
            keys = ", ".join(map(quoted, unknown))
            yield f"{self.config_json.file} has keys that DeepSeek's code does not read, passed over: {keys}"


def is_fp8(entry: TensorInfo) -> bool:
    """Return whether a tensor is stored as fp8 codes, which come with scales."""
    return entry.dtype is torch.float8_e4m3fn


def _require_shape(entry: TensorInfo, tensor: HFTensor, source: tuple[str, str]) -> None:
    """Raise UserError unless a tensor has the model's shape.

    `source` says where the model's numbers come from, and the fix.
    """
    if entry.shape != tensor.shape:
        text = f"has {quoted(tensor.name)} of shape {list(entry.shape)}, {source[0]} makes it"
        raise fault(entry.file, f"{text} {list(tensor.shape)}{source[1]}")
