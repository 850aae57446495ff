"""A CUDA device that is not one: tensors that say cuda:0, over numbers that lie on the CPU.

Inside `pretend_cuda()` a whole model can be moved to ``"cuda"`` and run. What fastlens decides from
a tensor's device is decided as on a GPU, every operation of PyTorch's is computed on the CPU, and a
kernel for GPUs is recorded and computed in one of two ways (`pretend_cuda`'s ``launch``). Reading
numbers on the host is counted: on a GPU each such read waits until all queued work is done.

With ``n_devices`` there are several. Each tensor says on which it lies, operations on tensors of
two are refused as CUDA refuses them, and copies between them are counted.

PyTorch itself takes these tensors for ones on its ``meta`` device, which a CPU build can trace and
differentiate; only Python sees cuda:0. So anything in C++ that looks at the device goes the way of
meta tensors, and streams and events are not pretended.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import fastlens.kernels.jit
from fastlens.kernels import compiled, reference
from fastlens.kernels.kernel import Kernel
from fastlens.ops import dispatch

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda:0")
# Operations whose result the host reads, or whose size it must know: CUDA waits in each.
READS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"),
    *("unique_dim", "unique_consecutive", "bincount"),
}
# Operations with which CPU tensors may meet CUDA ones: copies, and indices of an indexed tensor.
COPIES = {"_to_copy", "copy_", "copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Pretended(torch.Tensor):
    """A tensor on the pretended GPU; its numbers are ``inner``, on the CPU."""

    inner: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device = CUDA) -> "Pretended":
        if inner.is_meta:
            raise RuntimeError("numbers were lost on the way to the pretended GPU")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=META,
        )
        made.inner, made.place = inner, place
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretended CUDA tensor, outside `pretend_cuda`")

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        """The same numbers without a gradient; what is set is held from then on."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner, self.place = value.inner, value.device  # type: ignore[attr-defined]

    def get_device(self) -> int:
        """The number of the GPU."""
        return self.place.index

    def data_ptr(self) -> int:
        """Where the numbers lie. Kernels get it, so it is remembered as one on the GPU."""
        address = self.inner.data_ptr()
        gpu = _ACTIVE[-1] if _ACTIVE else None
        if gpu is not None:
            gpu.addresses.add(address)
        return address

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the numbers."""
        return self.inner.untyped_storage()

    def __getitem__(self, index: Any) -> Tensor:
        return torch.Tensor.__getitem__(self, _on_gpu(index, self.place))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _on_gpu(index, self.place), value)

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        """As `torch.tensor`, on the GPU."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.place)

    def tolist(self) -> Any:
        """A read by the host."""
        _ACTIVE[-1].reads.append("tolist")
        return self.inner.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        """Refused in CUDA's words."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(made, self.requires_grad)
        return made.requires_grad_(self.requires_grad)


def _on_gpu(index: Any, place: torch.device) -> Any:
    """An index whose lists are tensors: in C++ they would become tensors without numbers."""
    if isinstance(index, tuple):
        return tuple(_on_gpu(part, place) for part in index)
    return torch.tensor(index, device=place) if isinstance(index, list | np.ndarray) else index


def inner_of(x: Any) -> Any:
    """The CPU tensor under a pretended one; anything else as it is."""
    return x.inner if isinstance(x, Pretended) else x


class Call(NamedTuple):
    """One use of an op on the GPU: its name in the registry, and the kernel that served."""

    op: str
    kernel: str


class Launch(NamedTuple):
    """One launch: the kernel's own name, or the launcher's of csrc/, and what called it."""

    name: str
    call: Call


class PretendedGpu(TorchDispatchMode):
    """What was asked of the pretended GPU.

    Attributes:
        calls: Ops in the order of their use.
        launches: What their GPU kernels launched.
        reads: PyTorch's operations by which the host read numbers (each waits for the GPU).
        uploads: How many tensors were copied from the CPU.
        crossings: From where to where tensors were copied between GPUs, and their shapes.
        direct: GPU kernels called past their registered op, where torch.compile would see nothing.
    """

    # Takes the place of FakeTensorMode, for which PyTorch does not look for a driver.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__(_dispatch_key=None)
        self._mode_key = type(self)._mode_key
        self.calls: list[Call] = []
        self.launches: list[Launch] = []
        self.reads: list[str] = []
        self.direct: list[Call] = []
        self.uploads = 0
        self.crossings: list[tuple[str, str, tuple[int, ...]]] = []
        # Where `.to(...)`, whose device C++ must not see, puts its copy.
        self.target = CUDA
        self.addresses: set[int] = set()
        self._registered: list[str] = []
        self._serving: Call | None = None

    def counted(self) -> dict[tuple[str, str], int]:
        """How often each op was served by each kernel."""
        return dict(Counter(map(tuple, self.calls)))  # type: ignore[arg-type]

    def forget(self) -> None:
        """Start all records anew."""
        for record in (self.calls, self.launches, self.reads, self.direct, self.crossings):
            record.clear()
        self.uploads = 0

    # -- operations of PyTorch ---------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.namespace == "fastlens":
            return self._registered_op(func, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        ours = [x for x in leaves if isinstance(x, Pretended)]
        if ours and func.overloadpacket.__name__ != "_to_copy":
            # What C++ makes on the way is asked for on `meta`.
            self.target = ours[0].place
        with self:
            # Below autograd, such as in a kernel, these arrive whole.
            parts = func.decompose(*args, **kwargs) if _is_composite(func) else NotImplemented
        if parts is not NotImplemented:
            return parts
        name = func.overloadpacket.__name__
        if any(type(x) is Tensor and x.is_meta for x in leaves):
            raise RuntimeError(f"{func} got a tensor whose numbers were lost on the way here")
        if ours:
            if torch.Tag.inplace_view in func.tags and name != "detach_":
                raise NotImplementedError(f"{func} changes the shape of a pretended tensor")
            self._check_devices(name, args, leaves)
        target = kwargs.get("device")
        on_gpu = bool(ours) if target is None else torch.device(target).type != "cpu"
        inner_args, inner_kwargs = tree_unflatten(map(inner_of, leaves), spec)
        if target is not None:
            inner_kwargs["device"] = CPU
        place = ours[0].place if ours and target is None else self._place(target)
        if name == "copy_":
            on_gpu = isinstance(args[0], Pretended)
            if on_gpu:
                place = args[0].place
                self._crossed(args[1], place)
        self._count(name, args, bool(ours), on_gpu)
        out = func(*inner_args, **inner_kwargs)
        if not on_gpu:
            return out
        # What was written in place is returned itself.
        same = {id(x.inner): x for x in ours}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return same[id(x)] if id(x) in same else Pretended(x, place)

        return tree_map(wrapped, out)

    def _place(self, target: Any) -> torch.device:
        target = CUDA if target is None else torch.device(target)
        if target.type == "meta":
            return self.target
        return torch.device("cuda", target.index or 0)

    def _crossed(self, x: Any, to: torch.device) -> None:
        if isinstance(x, Pretended) and x.place != to:
            self.crossings.append((str(x.place), str(to), tuple(x.shape)))

    def _check_devices(self, name: str, args: Any, leaves: list[Any]) -> None:
        """Refuse as CUDA does; CPU scalars may join, and CPU indices of a CUDA tensor."""
        if name in COPIES:
            return
        given = leaves
        if name in INDEXED:
            # self, indices, values
            given = [args[0], *args[2:3]]
            if not isinstance(args[0], Pretended):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    "(cpu)"
                )
        strangers = [x for x in given if type(x) is not Pretended and isinstance(x, Tensor)]
        if any(x.dim() > 0 and not isinstance(x, Pretended) for x in strangers):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({name})"
            )
        places = {str(x.place) for x in given if isinstance(x, Pretended)}
        if name in INDEXED:
            indices = [x for x in args[1] if isinstance(x, Pretended)]
            places |= {str(x.place) for x in indices}
        if len(places) > 1:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(sorted(places))}! ({name})"
            )

    def _count(self, name: str, args: Any, from_gpu: bool, to_gpu: bool) -> None:
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            is_there = isinstance(source, Pretended)
            if is_there and not to_gpu:
                self.reads.append(name)
            self.uploads += to_gpu and not is_there
        elif from_gpu and (name in READS or (name in INDEXED and _counts_a_mask(name, args))):
            self.reads.append(name)

    # -- ops and kernels of fastlens ---------------------------------------------------------------

    def _registered_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        is_here = any(isinstance(x, Pretended) for x in tree_flatten((args, kwargs))[0])
        key = torch._C.DispatchKey.CUDA if is_here else torch._C.DispatchKey.CPU
        self._registered.append(func.overloadpacket.__name__)
        try:
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self._registered.pop()
        _check_fake(func, args, kwargs, out)
        return out

    def recorded(self, kernel: Kernel, launch: bool) -> Callable[..., Any]:
        """A kernel's function as dispatch sees it here."""

        @functools.wraps(kernel.fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves = tree_flatten((args, kwargs))[0]
            if not any(isinstance(x, Pretended) for x in leaves):
                return kernel.fn(*args, **kwargs)
            call = Call(kernel.op, kernel.name)
            self.calls.append(call)
            if not kernel.is_for_gpus:
                return kernel.fn(*args, **kwargs)
            if not self._registered:
                self.direct.append(call)
            with self._launching(call):
                if launch:
                    return kernel.fn(*args, **kwargs)
                dry = kernel.fn(*tree_map(_copied, args), **tree_map(_copied, kwargs))
            on_cpu = _on_cpu(kernel.op, leaves)
            out = on_cpu(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
            return _filled(dry, out, kernel.name)

        return run

    @contextlib.contextmanager
    def _launching(self, call: Call) -> Iterator[None]:
        before, self._serving = self._serving, call
        self.addresses.clear()
        try:
            yield
        finally:
            self._serving = before

    def launched(self, name: str, arguments: Any, *, are_addresses: bool) -> None:
        """Record a launch: every tensor must be on the GPU, every address that of such a one."""
        if self._serving is None:
            raise RuntimeError(f"{name} was launched, and dispatch had chosen no kernel")
        for index, x in enumerate(arguments):
            if isinstance(x, Tensor) and not isinstance(x, Pretended):
                raise ValueError(
                    f"Pointer argument (at {index}) of {name} cannot be accessed from Triton (cpu "
                    "tensor?)"
                )
            if are_addresses and type(x) is int and x >= 2**32 and x not in self.addresses:
                raise ValueError(f"argument {index} of {name} is no address on the GPU")
        self.launches.append(Launch(name, self._serving))


# The one that is entered, if any.
_ACTIVE: list[PretendedGpu] = []


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _counts_a_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask whose True places must be counted; one value needs no count."""
    masks = (torch.bool, torch.uint8)
    if not any(isinstance(x, Pretended) and x.dtype in masks for x in args[1]):
        return False
    return name == "index" or args[2].numel() != 1


def _copied(x: Any) -> Any:
    """A copy for a dry run, at the same strides; what is expanded no kernel may write to."""
    if not isinstance(x, Pretended) or 0 in x.stride():
        return x
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return Pretended(copy.copy_(x.inner), x.place)


def _filled(dry: Any, computed: Any, name: str) -> Any:
    """What a launcher returned, with the numbers that its launches would have left there."""
    theirs, spec = tree_flatten(dry)
    ours, _ = tree_flatten(computed)
    kinds = [
        [(x.device.type, x.dtype, x.shape) if isinstance(x, Tensor) else x for x in leaves]
        for leaves in (theirs, [Pretended(x) if isinstance(x, Tensor) else x for x in ours])
    ]
    if kinds[0] != kinds[1]:
        raise RuntimeError(f"{name} gives {kinds[0]}, and should give {kinds[1]}")
    for there, here in zip(theirs, ours, strict=True):
        if isinstance(there, Pretended):
            there.inner.copy_(here)
    return tree_unflatten(theirs, spec)


def _check_fake(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """What the op's fake says of its results must be so: compilers rely on it."""

    def layout(x: Tensor) -> Any:
        lengths = zip(x.shape, x.stride(), strict=True)
        return x.dtype, x.shape, [stride for n, stride in lengths if n > 1 and x.numel()]

    def meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    with _disable_current_modes(), torch.no_grad():
        said = func(*tree_map(meta, args), **tree_map(meta, kwargs))
    found, expected = (
        [layout(x) for x in tree_flatten(results)[0] if isinstance(x, Tensor)]
        for results in (out, said)
    )
    if found != expected:
        raise RuntimeError(f"{func} gives {found}, and its fake says {expected}")


def _on_cpu(op: str, leaves: list[Any]) -> Callable[..., Any]:
    """What the CPU would take for the op."""
    dtypes = [x for x in leaves if isinstance(x, torch.dtype)] if op == "dequantize" else []
    first = next(x for x in leaves if isinstance(x, Tensor))
    return dispatch.choose(op, "cpu", (*dtypes, first.dtype)[0])


class _TritonKernel:
    """In the place of a ``@triton.jit`` function."""

    def __init__(self, gpu: PretendedGpu, name: str, real: Any):
        self.gpu, self.name, self.real = gpu, name, real

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.gpu.launched(self.name, (*args, *kwargs.values()), are_addresses=False)
            if self.real is not None:
                self.real[grid](*map(inner_of, args), **kwargs)

        return launch


class _TritonModule(ModuleType):
    """In the place of a module of ``fastlens.kernels.jit``, which would import triton."""

    def __init__(self, gpu: PretendedGpu, name: str, real: ModuleType | None):
        super().__init__(name)
        self.__dict__["_gpu"], self.__dict__["_real"] = gpu, real

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_kernel"):
            raise AttributeError(name)
        real = self.__dict__["_real"]
        return _TritonKernel(self.__dict__["_gpu"], name, real and getattr(real, name))


class _Launchers:
    """In the place of the compiled module of csrc/."""

    def __init__(self, gpu: PretendedGpu, real: Any):
        self.gpu, self.real = gpu, real

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            self.gpu.launched(name, args, are_addresses=True)
            if self.real is not None:
                getattr(self.real, name)(*args)

        return launch


def _recorded_kernels(gpu: PretendedGpu, launch: bool) -> dict[str, list[Kernel]]:
    """The registry, each kernel recorded, and the references at the end of each list."""
    found = {}
    for op, kernels in _REGISTRY().items():
        kernels = list(kernels)
        if hasattr(reference, op):
            plain = getattr(reference, op)
            kernels.append(Kernel(op, "reference", plain, lambda *_: None, priority=-100))
        found[op] = [dataclasses.replace(k, fn=gpu.recorded(k, launch)) for k in kernels]
    return found


@contextlib.contextmanager
def pretend_cuda(
    *,
    triton: bool = True,
    csrc: bool = False,
    launch: bool = False,
    capability: tuple[int, int] = (9, 0),
    n_devices: int = 1,
) -> Iterator[PretendedGpu]:
    """Inside, there are ``n_devices`` CUDA devices of that compute capability.

    Args:
        triton: FASTLENS_TRITON=1, and triton is installed.
        csrc: The compiled module was built.
        launch: False: a GPU kernel's launcher runs on copies, its launches are recorded and do
            nothing, and the result is computed by what the CPU would take. True: launches are
            carried out on the CPU, by Triton's interpreter (in a process of `tests.gpu.workers`)
            and by the launchers in Python of `tests.kernels.launchers_in_python`.
    """
    # At its import it asks for real devices, and every mode imports it.
    importlib.import_module("torch._dynamo")
    gpu = PretendedGpu()
    real = None
    if csrc and launch:
        from tests.kernels.launchers_in_python import PythonLaunchers

        real = PythonLaunchers()
    module = _Launchers(gpu, real) if csrc else None
    find_spec = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        return (object() if triton else None) if name == "triton" else find_spec(name, package)

    registry = _recorded_kernels(gpu, launch)
    patches: list[Any] = [
        mock.patch.object(dispatch, "kernels", lambda: registry),
        mock.patch.object(dispatch, "_CHOSEN", {}),
        mock.patch.object(dispatch, "_OPAQUE", set()),
        mock.patch.object(compiled, "module", lambda: module),
        mock.patch.object(importlib.util, "find_spec", found),
        mock.patch.dict("os.environ", {"FASTLENS_TRITON": "1" if triton else ""}),
        mock.patch.object(torch.Tensor, "to", _to),
        mock.patch.object(torch.Tensor, "cuda", lambda x, *_, **__: x.to("cuda")),
        mock.patch.object(torch, "tensor", _on_cpu_first(torch.tensor)),
        mock.patch.object(torch, "as_tensor", _on_cpu_first(torch.as_tensor)),
        mock.patch.object(torch.Tensor, "pin_memory", lambda x, *_: x),
        *_torch_cuda(capability, n_devices),
        _imported(_triton_modules(gpu, launch) if triton else {}),
    ]
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        # `module.to(...)` would otherwise put new contents under the old type.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        _ACTIVE.append(gpu)
        stack.callback(_ACTIVE.pop)
        stack.enter_context(gpu)
        yield gpu


_TENSOR_TO, _REGISTRY = torch.Tensor.to, dispatch.kernels


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``x.to(...)``, which in C++ asks for the driver before anything else."""

    gpu = _ACTIVE[-1]
    gpu.target = CUDA

    def here(value: Any) -> Any:
        if isinstance(value, str) and value not in ("cpu", "meta"):
            value = torch.device(value)
        is_cuda = isinstance(value, torch.device) and value.type == "cuda"
        if is_cuda:
            gpu.target = torch.device("cuda", value.index or 0)
        return META if is_cuda else value

    if args and isinstance(args[0], Pretended):
        gpu.target = args[0].place
        args = (META, args[0].dtype, *args[1:])
    elif isinstance(x, Pretended):
        gpu.target = x.place
    args, kwargs = tuple(map(here, args)), {name: here(v) for name, v in kwargs.items()}
    if isinstance(x, Pretended) and META in (*args, *kwargs.values()) and gpu.target != x.place:
        # To C++ it is there already.
        x = _Crossing.apply(x, gpu.target)
    return _TENSOR_TO(x, *args, **kwargs)


class _Crossing(torch.autograd.Function):
    """A copy from one pretended GPU to another; its gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, x: Any, to: torch.device) -> Any:
        ctx.back = x.place
        _ACTIVE[-1]._crossed(x, to)
        return Pretended(x.inner.clone(), to)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.back), None


def _on_cpu_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor(..., device="cuda")``, which in C++ copies past every mode."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        requires_grad = kwargs.pop("requires_grad", False)
        tensor = make(*args, **kwargs)
        tensor = tensor if device is None else tensor.to(device)
        return tensor.requires_grad_() if requires_grad else tensor

    return made


def _torch_cuda(capability: tuple[int, int], n_devices: int) -> list[Any]:
    """What fastlens asks ``torch.cuda``."""
    about = SimpleNamespace(
        name="pretended GPU", major=capability[0], minor=capability[1], total_memory=80 * 2**30
    )
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: n_devices,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: about,
        "mem_get_info": lambda device=None: (64 * 2**30, 80 * 2**30),
        "memory_allocated": lambda device=None: 0,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: _ACTIVE[-1].reads.append("synchronize"),
    }
    patches = [mock.patch.object(torch.cuda, name, answer) for name, answer in answers.items()]
    return [*patches, mock.patch.object(torch.version, "hip", None)]


@contextlib.contextmanager
def _imported(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Modules in the place of others; what is imported meanwhile stays, unlike in `mock`."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _triton_modules(gpu: PretendedGpu, launch: bool) -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(fastlens.kernels.jit.__path__):
        name = f"fastlens.kernels.jit.{info.name}"
        real = importlib.import_module(name) if launch else None
        modules[name] = _TritonModule(gpu, name, real)
    return modules
