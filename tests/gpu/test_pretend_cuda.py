"""The pretended GPU: it computes what the CPU does, and refuses and waits where CUDA does."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from fastlens.kernels import compiled
from fastlens.kernels.capability import capability
from fastlens.ops import dispatch
from fastlens.ops.capture import capture
from fastlens.ops.patch_sites import patch_sites
from tests.close import assert_close_to
from tests.gpu.pretend_cuda import CUDA, Call, Launch, Pretended, pretend_cuda
from tests.models import ours, prompts


@pytest.fixture
def gpu():
    with pretend_cuda() as made:
        yield made


def test_tensors_are_made_there(gpu):
    x = torch.randn(3, 4)
    like = x.to("cuda")
    for made in (
        *(torch.zeros(2, device="cuda"), torch.empty(2, 3, device=torch.device("cuda"))),
        *(torch.arange(5, device="cuda:0"), torch.tensor([1, 2], device="cuda")),
        *(torch.as_tensor(np.ones(3), device="cuda"), torch.full((2,), 1.0, device="cuda")),
        *(x.cuda(), x.to(device="cuda"), x.to(torch.device("cuda", 0), torch.float16), x.to(like)),
        *(like.new_zeros(3), like.new_tensor([1.0]), torch.ones_like(like), like.clone()),
        *(torch.zeros_like(x, device="cuda"), like[0], like.T, like.view(-1), like + 1),
        *(torch.eye(2, device="cuda"), torch.ones(2, device="cuda").expand(3, 2)),
    ):
        assert type(made) is Pretended and made.device == CUDA and made.is_cuda
    for made in (torch.zeros(2), like.cpu(), like.to("cpu"), torch.ones_like(like, device="cpu")):
        assert type(made) is torch.Tensor and made.device.type == "cpu"
    assert torch.equal(like.cpu(), x) and like.to("cuda") is like
    assert like.dtype == x.dtype and like.stride() == x.stride() and "Pretended" in repr(like)
    assert like.get_device() == 0 and not like.is_cpu and not like.is_meta


def index_and_write(device):
    """Views, indices of each kind and writes through them; what a wrong alias would change."""
    x = torch.arange(24.0, device=device).view(2, 3, 4)
    view = x[:, 1]
    view += 10
    x[0, [0, 2], 1:3] = -1.0
    x[torch.tensor([1]), torch.tensor([0])] = torch.zeros(1, 4, device=device)
    mask = x > 15
    x[mask] = 15.0
    counts = torch.zeros(3, device=device)
    counts.index_add_(0, torch.tensor([0, 2, 0], device=device), torch.ones(3, device=device))
    x[:, :, 0].mul_(2)
    out = torch.empty(2, 3, device=device)
    torch.sum(x, -1, out=out)
    rows = x.flatten(1)[:, np.array([1, 5])]
    return [x, view, mask.nonzero(), counts, out, rows, x.as_strided((2, 2), (12, 1), 4)]


def compute(device):
    """What models are made of."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 4).to(device), torch.randn(5, 4).to(device)
    q = torch.randn(2, 2, 3, 4).to(device)
    tokens = torch.tensor([[0, 3, 1]], device=device)
    return [
        *(F.linear(x, w), F.layer_norm(x, (4,)), F.gelu(x), torch.einsum("bpd,ed->bpe", x, w)),
        *(F.scaled_dot_product_attention(q, q, q, is_causal=True), F.embedding(tokens, w)),
        *(x.softmax(-1), x.max(-1).values, torch.cat([x, x], 1), F.pad(x, (1, 0)), x.half()),
        *(torch.where(x > 0, x, 0.0), torch.topk(x, 2).indices, x.cumsum(1), x.std(-1)),
        *(torch.ones(3, 3, device=device).tril().bool(), F.cross_entropy(x[0], tokens[0])),
        *x.split(1, 1),
    ]


@pytest.mark.parametrize("work", [index_and_write, compute])
def test_numbers_are_the_cpus(gpu, work):
    found = work("cuda")
    with torch.inference_mode():
        again = work("cuda")
    for one, two, expected in zip(found, again, work("cpu"), strict=True):
        assert type(one) is Pretended is type(two)
        assert_close_to(one.inner, expected, atol=1e-6)
        assert_close_to(two.inner, expected, atol=1e-6)


def test_devices_may_not_be_mixed(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for mix in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: F.linear(there, torch.ones(2, 3)),
        lambda: torch.where(there > 0, there, here),
        lambda: there.index_put((torch.tensor([0, 1]),), torch.ones(2)),
        lambda: F.embedding(torch.tensor([0]), torch.ones(2, 2, device="cuda")),
        lambda: there.index_select(0, torch.tensor([0])),
    ):
        with pytest.raises(RuntimeError, match="same device, but found at least two devices"):
            mix()
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        here[there.long()]
    # These CUDA allows.
    assert (there + torch.tensor(2.0)).device == CUDA
    assert there[torch.tensor([0, 2])].device == CUDA and there[[0, 2]].device == CUDA
    there[torch.tensor([0])] = torch.tensor(5.0)
    there.copy_(here)
    here.copy_(there)


def test_lost_numbers_are_noticed(gpu):
    """A tensor of PyTorch's own meta device would make nonsense of whatever it meets."""
    with _disable_current_modes():
        lost = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="numbers were lost"):
        torch.ones(3, device="cuda") + lost
    with pytest.raises(RuntimeError, match="numbers were lost"):
        Pretended(lost)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: int(x[0, 0]), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: x.to("cpu", torch.float64), "_to_copy"),
        (lambda x: torch.empty(2, 2).copy_(x), "copy_"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_reads_by_the_host_are_counted(gpu, read, name):
    x = torch.ones(2, 2).to("cuda")
    assert gpu.reads == [] and gpu.uploads == 1
    read(x)
    assert gpu.reads == [name] and gpu.uploads == 1


def test_what_waits_for_nothing_is_not_counted(gpu):
    x = torch.ones(2, 2, device="cuda")
    x[x > 0] = 2.0
    x = x.to("cuda").half().view(-1)[:2].clone() @ torch.zeros(2, device="cuda").half()
    torch.zeros(3).tolist()
    assert gpu.reads == [] and gpu.uploads == 0
    x[...] = torch.tensor(1.0)
    torch.ones(3, device="cuda")[[0, 2]]
    assert gpu.reads == [] and gpu.uploads == 2


def test_numpy_is_refused_as_by_cuda(gpu):
    x = torch.ones(3, device="cuda")
    for read in (lambda: x.numpy(), lambda: np.asarray(x), lambda: torch.from_numpy(x)):
        with pytest.raises(TypeError):
            read()


def test_modules_move_and_gradients_flow(gpu):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    twin = copy.deepcopy(net)
    net.to("cuda")
    assert all(isinstance(p, nn.Parameter) and p.device == CUDA for p in net.parameters())
    x = torch.randn(5, 4)
    net(x.to("cuda")).sum().backward()
    twin(x).sum().backward()
    for moved, stayed in zip(net.parameters(), twin.parameters(), strict=True):
        assert moved.grad.device == CUDA
        assert_close_to(moved.grad.inner, stayed.grad)
    third = copy.deepcopy(net)
    with torch.no_grad():
        third[0].weight.zero_()
    assert net[0].weight.abs().sum() > 0 and third[0].weight.abs().sum() == 0
    assert net.cpu()[0].weight.device.type == "cpu"


def test_a_models_parameters_stay_laid_out(gpu):
    model = ours("llama")
    before = {name: p.stride() for name, p in model.named_parameters()}
    model.to("cuda")
    attn = model.blocks[0].attn
    assert {name: p.stride() for name, p in model.named_parameters()} == before
    gap = attn._W_K.data_ptr() - attn.W_Q.data_ptr()
    assert gap == attn.W_Q.numel() * attn.W_Q.element_size()


def test_it_says_what_fastlens_asks_of_torch():
    with pretend_cuda():
        assert torch.cuda.is_available() and capability(CUDA) == (9, 0)
        assert dispatch.explain("attention", CUDA).kernel == "triton attention"
        assert "CUDA C++ capture" in dispatch.explain("capture", CUDA).refused
    with pretend_cuda(capability=(7, 5)):
        assert "7.5" in dispatch.explain("attention", CUDA).refused["triton attention"]
    with pretend_cuda(triton=False, csrc=True):
        assert dispatch.explain("attention", CUDA).kernel.startswith("torch")
        assert dispatch.explain("capture", CUDA).kernel == "CUDA C++ capture"


def test_nothing_is_left_behind():
    before = {
        name: getattr(torch.cuda, name) for name in ("is_available", "device", "device_count")
    }
    find_spec, kernels, module = importlib.util.find_spec, dispatch.kernels, compiled.module
    chosen = dict(dispatch._CHOSEN)
    with pytest.raises(ZeroDivisionError), pretend_cuda(csrc=True):
        x = torch.ones(2, device="cuda")
        1 / 0  # noqa: B018
    assert all(getattr(torch.cuda, name) is value for name, value in before.items())
    assert (find_spec, kernels, module) == (
        importlib.util.find_spec,
        dispatch.kernels,
        compiled.module,
    )
    assert chosen == dispatch._CHOSEN
    assert "to" not in vars(torch.Tensor) and "cuda" not in vars(torch.Tensor)
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.raises(RuntimeError, match="outside `pretend_cuda`"):
        x + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_there_is_no_gpu_afterwards():
    with pretend_cuda():
        torch.ones(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")


# -- kernels ---------------------------------------------------------------------------------------


def test_a_kernel_for_gpus_is_recorded_and_computed(gpu):
    x, sites = torch.randn(3, 4), torch.tensor([[0], [2]])
    found = capture(x.to("cuda"), sites, torch.float16)
    assert found.device == CUDA and torch.equal(found.inner, x[[0, 2]].half())
    call = Call("capture", "triton capture")
    assert gpu.calls == [call] and gpu.launches == [Launch("capture_kernel", call)]
    assert gpu.direct == [] and gpu.counted() == {("capture", "triton capture"): 1}
    assert torch.equal(capture(x, sites), x[[0, 2]])
    assert len(gpu.calls) == 1, "the CPU's own calls are not the GPU's"


def test_a_dry_run_changes_nothing():
    with pretend_cuda(csrc=True) as gpu:
        x = torch.randn(3, 4)
        moved = x.to("cuda")
        found = patch_sites(moved, torch.tensor([[1]]), torch.ones(4, device="cuda"), "add")
        assert torch.equal(moved.inner, x) and torch.equal(found.inner[1], x[1] + 1)
        assert [launch.name for launch in gpu.launches] == ["patch_sites"]


def test_launches_may_be_carried_out_by_launchers_in_python():
    with pretend_cuda(csrc=True, triton=False, launch=True) as gpu:
        x = torch.randn(3, 4)
        found = patch_sites(x.to("cuda"), torch.tensor([[1]]), None, "zero")
        assert torch.equal(found.inner[1], torch.zeros(4)) and torch.equal(found.inner[0], x[0])
        assert [launch.name for launch in gpu.launches] == ["patch_sites"]


def test_a_kernel_past_its_op_is_noticed(gpu):
    x = torch.randn(3, 4, device="cuda")
    kernel = dispatch.kernel_for("capture", "cuda", x.dtype)
    kernel(x, torch.tensor([[1]]), x.dtype)
    assert gpu.direct == [Call("capture", "triton capture")]


def test_a_launch_with_a_cpu_tensor_is_refused(monkeypatch):
    from fastlens.kernels import cuda_capture, triton_capture

    x, table = torch.randn(3, 4), torch.tensor([[1]])
    with pretend_cuda(csrc=True) as gpu:
        call = Call("capture", "a launcher that forgets")
        with gpu._launching(call), pytest.raises(ValueError, match="no address on the GPU"):
            cuda_capture.capture(x, table, x.dtype)
        with gpu._launching(call), pytest.raises(ValueError, match="cannot be accessed"):
            triton_capture.capture(x, table, x.dtype)
        with pytest.raises(RuntimeError, match="chosen no kernel"):
            triton_capture.capture(x.to("cuda"), table, x.dtype)
        assert gpu.launches == []


def test_a_whole_model_runs(gpu):
    model, tokens = ours("gpt2"), prompts()
    expected = model(tokens)
    model.to("cuda")
    moved = tokens.to("cuda")
    gpu.forget()
    logits = model(moved)
    assert logits.device == CUDA and gpu.reads == [] and gpu.calls
    assert_close_to(logits.inner, expected.detach())


def test_several_devices_do_not_mix():
    with pretend_cuda(triton=False, n_devices=2) as gpus:
        assert torch.cuda.device_count() == 2
        here, there = torch.ones(3).to("cuda:0"), torch.ones(3, device="cuda:1")
        assert (here.device.index, there.device.index, there.get_device()) == (0, 1, 1)
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here.add_(there),
            lambda: here[there.long()],
            lambda: here * there.sum(),
        ):
            with pytest.raises(RuntimeError, match="two devices, cuda:0 and cuda:1"):
                mixed()
        gpus.forget()
        assert (here.to("cuda:1") + there).device == there.device
        assert here.to("cuda:0") is here and here.to(there).device == there.device
        here.copy_(there)
        assert gpus.crossings == [
            *[("cuda:0", "cuda:1", (3,))] * 2,
            ("cuda:1", "cuda:0", (3,)),
        ]
        learned = torch.ones(3, device="cuda:0", requires_grad=True)
        (learned.to("cuda:1") * there * 3).sum().backward()
        assert learned.grad.device == here.device and learned.grad.cpu().tolist() == [3.0] * 3
        moved = nn.Linear(3, 2).to("cuda:1")
        assert {p.device for p in moved.parameters()} == {there.device}
        assert moved(there).device == copy.deepcopy(moved)(there).device == there.device
        causal = F.scaled_dot_product_attention(*[torch.ones(1, 2, 3, 4).to("cuda:1")] * 3)
        assert causal.device == there.device
