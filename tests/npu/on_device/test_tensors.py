"""Operators, views, updates in place and devices: as on the CPU, on the right device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

NPU = torch.device("npu", 0)


def numbers() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., 2:], x[..., :2]), -1)


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda x: (x + 1) * x / 7 - x.sqrt(),
    "matmul": lambda x: x @ x.t(),
    "bf16 matmul": lambda x: x.bfloat16() @ x.bfloat16().t(),
    "int64": lambda x: x.long() // 3 % 2,
    "number beside a bf16 scalar": lambda x: x.bfloat16().sum() * 0.1 + 1,
    "compare": lambda x: (x > 3) & (x <= 7),
    "where": lambda x: torch.where(x > 2, x, torch.zeros((), device=x.device)),
    "masked_fill": lambda x: x.masked_fill(x > 3, -torch.inf),
    "rotate half": rotate_half,
    "cat and split": lambda x: torch.cat([x, x], 1).split(3, 1)[1],
    "expand": lambda x: x[:1].expand(5, 4).contiguous(),
    "gather": lambda x: x.gather(1, torch.tensor([[1], [0], [3]], device=x.device)),
    "index_select": lambda x: x.index_select(0, torch.tensor([2, 0], device=x.device)),
    "advanced index": lambda x: x[torch.tensor([2, 0], device=x.device)],
    "embedding": lambda x: F.embedding(torch.tensor([[1, 2]], device=x.device), x),
    "topk": lambda x: torch.topk(x, 2).indices,
    "sort": lambda x: x.sort(-1, descending=True)[0],
    "cumsum": lambda x: x.cumsum(-1),
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "rms_norm": lambda x: F.rms_norm(x, (4,), x[0], 1e-6),
    "silu": F.silu,
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 3, 1], device=x.device)),
    "foreach": lambda x: torch._foreach_add([x, x], 1.0)[1],
    "arange": lambda x: torch.arange(3, 9, device=x.device),
    "norm": lambda x: torch.linalg.vector_norm(x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operator_gives_what_the_cpu_gives(name: str) -> None:
    expected = OPERATIONS[name](numbers())
    result = OPERATIONS[name](numbers().to("npu"))
    assert result.device == NPU
    assert result.dtype == expected.dtype
    assert torch.equal(result.cpu(), expected)


def test_causal_grouped_attention_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 6, 8, generator=generator) for heads in (4, 2))
    expected = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    query, key = query.to("npu"), key.to("npu")
    result = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(result.cpu(), expected)


def test_a_view_shares_memory_with_its_base() -> None:
    x = numbers().to("npu")
    x.view(4, 3)[1:, 2:].fill_(7)
    expected = numbers()
    expected.view(4, 3)[1:, 2:].fill_(7)
    assert torch.equal(x.cpu(), expected)
    assert x.t().data_ptr() == x.data_ptr()


def test_an_update_in_place_keeps_the_address_and_returns_the_same_tensor() -> None:
    x = numbers().to("npu")
    address = x.data_ptr()
    assert x.mul_(2).add_(1) is x
    assert x.data_ptr() == address
    assert torch.equal(x.cpu(), numbers() * 2 + 1)


@pytest.mark.parametrize("on_host", [False, True])
def test_scattered_rows_land_in_place(on_host: bool) -> None:
    rows = torch.tensor([1, 3], device="cpu" if on_host else "npu")
    cache = torch.zeros(4, 3, device="npu")
    cache[rows] = torch.ones(2, 3, device="npu")
    assert cache.cpu().sum(1).tolist() == [0.0, 3.0, 0.0, 3.0]


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        numbers().to("npu") + numbers()
    with pytest.raises(RuntimeError, match="same device"):
        F.embedding(torch.tensor([1]), numbers().to("npu"))


def test_a_cpu_number_mixes_with_device_tensors() -> None:
    assert torch.equal((numbers().to("npu") * torch.tensor(2.0)).cpu(), numbers() * 2)


def test_a_device_tensor_is_no_numpy_array() -> None:
    with pytest.raises(TypeError, match="numpy"):
        numbers().to("npu").numpy()


def test_there_is_one_card() -> None:
    assert torch.empty(1, device="npu:0").device == NPU
    with pytest.raises(RuntimeError, match="Invalid device ID 1"):
        torch.empty(1, device="npu:1")
    with pytest.raises(RuntimeError, match="Invalid device ID 2"):
        numbers().to("npu:2")


def test_a_module_is_built_on_meta_moved_and_copied() -> None:
    layer = torch.nn.Linear(2, 3, device="meta").to_empty(device="npu")
    layer.load_state_dict({"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    duplicate = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert duplicate.weight.device == NPU
    assert torch.equal(duplicate.weight.cpu(), torch.ones(3, 2))


def test_safetensors_travel_to_and_from_the_device(tmp_path: Path) -> None:
    save_file({"w": numbers().to("npu")}, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors", device="npu:0")["w"]
    assert loaded.device == NPU
    assert torch.equal(loaded.cpu(), numbers())


def test_tensors_print_themselves() -> None:
    assert "device='npu:0'" in repr(numbers().to("npu"))
