"""A streamed model against the same model in memory: everything it does, to the bit."""

import copy
import pickle

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import (
    ConfigError,
    EditedError,
    MemoryLimitError,
    SourceError,
    StreamError,
)
from fastlens.model.streaming import Streaming, refuse_streamed, stream_limit
from fastlens.patching import logit_diff, sweep
from tests.weights.checkpoints import VOCAB, hf_model, prompt, save_folder, write_gguf

CASES = ["gpt2", "gpt2_untied", "neox", "llama_grouped", "llama_tied", "mistral_window"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {case: save_folder(root / case, case) for case in CASES}


def load(folder, **options):
    return HookedTransformer.from_pretrained(str(folder), verbose=False, **options)


@pytest.fixture(params=CASES)
def pair(request, folders):
    folder = folders[request.param]
    return load(folder), load(folder, offload="disk")


@pytest.fixture
def llama(folders):
    return load(folders["llama_grouped"]), load(folders["llama_grouped"], offload="disk")


def held(model) -> list[str]:
    return [name for name, group in model.streaming.stream.groups.items() if group.is_here]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# -- everything works, to the bit ------------------------------------------------------------------


def test_logits_cache_and_gradients(pair):
    in_memory, streamed = pair
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(in_memory(prompt()), streamed(prompt()))
            caches = [m.run_with_cache(prompt())[1] for m in pair]
        assert_same(*caches)
    caches = [m.run_with_cache(prompt(), return_type="loss", incl_bwd=True)[1] for m in pair]
    assert any(key.endswith("_grad") for key in caches[0])
    assert_same(*caches)


def test_sweeps(pair):
    clean, corrupted = prompt()[:1], prompt()[:1].clone()
    corrupted[0, 2] = 7
    for sites in ("resid_pre", "z", "mlp_out"):
        found = [
            sweep(m, clean, corrupted, sites=sites, metric=logit_diff(5, 9), progress=False)
            for m in pair
        ]
        assert torch.equal(found[0].values, found[1].values)
        assert found[1].certificate["runs"] > 0


def test_hooks_and_generation(pair):
    in_memory, streamed = pair

    def double(activation, hook):
        activation *= 2

    hooks = [("blocks.1.hook_resid_pre", double), ("blocks.2.attn.hook_pattern", double)]
    with torch.no_grad():
        found = [m.run_with_hooks(prompt(), fwd_hooks=hooks) for m in pair]
        assert torch.equal(*found)
        options = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
        assert torch.equal(
            in_memory.generate(prompt(), **options), streamed.generate(prompt(), **options)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("processed", [True, False])
def test_dtypes_and_processing(folders, dtype, processed):
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    flags = {} if processed else dict.fromkeys(names, False)
    for case in ("gpt2", "llama_grouped"):
        a, b = (load(folders[case], dtype=dtype, offload=o, **flags) for o in (None, "disk"))
        with torch.no_grad():
            assert torch.equal(a(prompt()), b(prompt()))
            clean, corrupted = prompt()[:1], prompt()[:1].flip(1)
            one, two = (
                sweep(m, clean, corrupted, metric=logit_diff(5, 9), progress=False, verify=0)
                for m in (a, b)
            )
            assert torch.equal(one.values, two.values)


@pytest.mark.parametrize("offload", ["disk", "cpu"])
@pytest.mark.parametrize("quantize", [None, "Q8_0"])
def test_gguf_stays_packed(tmp_path, offload, quantize):
    path = write_gguf(tmp_path / "llama.gguf", "llama_grouped", quantize=quantize)
    a, b = load(path), load(path, offload=offload)
    with torch.no_grad():
        assert torch.equal(a(prompt()), b(prompt()))
        assert torch.equal(a(prompt()), b(prompt()))


def test_a_folder_that_fastlens_wrote(tmp_path, llama):
    llama[0].save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(prompt()), load(tmp_path, offload="disk")(prompt()))


def test_the_toy_model():
    a, b = (HookedTransformer.from_pretrained("toy-induction", offload=o, verbose=False)
            for o in (None, "cpu"))  # fmt: skip
    with torch.no_grad():
        assert torch.equal(a("abcabc"), b("abcabc"))


def test_weights_read_by_name(pair):
    in_memory, streamed = pair
    for name in ("W_E", "W_U", "b_U", "W_Q", "W_K", "W_O", "W_in", "b_out"):
        assert torch.equal(getattr(in_memory, name), getattr(streamed, name)), name
    assert torch.equal(in_memory.accumulated_bias(2), streamed.accumulated_bias(2))
    assert {n: p.shape for n, p in in_memory.named_parameters()} == {
        n: p.shape for n, p in streamed.named_parameters()
    }


def test_directions_of_tokens(pair):
    in_memory, streamed = pair
    for tokens in (torch.tensor([5, 3, 3]), torch.tensor([[4], [5]]), torch.tensor(9), 7):
        want = in_memory.tokens_to_residual_directions(tokens)
        found = streamed.tokens_to_residual_directions(tokens)
        assert want.shape == found.shape
        assert torch.equal(want, found)


def test_a_token_outside_the_vocabulary(llama):
    for model in llama:
        with pytest.raises(IndexError):
            model(torch.tensor([[VOCAB]]))


# -- what is in memory when ------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_asked_for(llama):
    streamed = llama[1]
    assert held(streamed) == []
    assert streamed.streaming.stream.bytes_read == 0
    with torch.no_grad():
        streamed(prompt(), stop_at_layer=1)
    assert "blocks.0" in held(streamed)
    assert "embed" not in held(streamed)
    assert "unembed" not in held(streamed)


def test_two_layers_at_most_without_a_limit(llama):
    streamed = llama[1]
    most = 0

    def look(activation, hook):
        nonlocal most
        most = max(most, len(held(streamed)))

    with torch.no_grad():
        streamed.run_with_hooks(
            prompt(), return_type=None, fwd_hooks=[(lambda n: n.endswith("resid_post"), look)]
        )
    assert 0 < most <= 2


def test_metrics_read_columns_only(llama):
    streamed = llama[1]
    sweep(streamed, prompt()[:1], prompt()[1:], metric=logit_diff(5, 9), progress=False, verify=0)
    assert not {"embed", "unembed"} & set(held(streamed))


def test_gradients_keep_no_weights_alive(llama):
    streamed = llama[1]
    stream = streamed.streaming.stream
    loss = streamed(prompt(), return_type="loss")
    assert len(held(streamed)) <= 2
    read = stream.bytes_read
    loss.backward()
    assert stream.bytes_read > read
    assert len(held(streamed)) <= 2


# -- edits ---------------------------------------------------------------------------------------


def edits(model):
    attn = model.blocks[0].attn
    return {
        "in place": lambda: attn.W_Q.mul_(2),
        "a part": lambda: attn.W_Q[0].zero_(),
        "data": lambda: attn.W_Q.data.mul_(3),
        "set data": lambda: setattr(attn.W_O, "data", attn.W_O.detach() * 2),
        "replaced": lambda: setattr(attn, "W_O", torch.nn.Parameter(attn.W_O.detach() * 0)),
        "embedding": lambda: model.W_E[16].zero_(),
        "unembedding": lambda: model.W_U[:, 5].zero_(),
    }


@pytest.mark.parametrize("edit", ["in place", "a part", "data", "set data", "replaced",
                                  "embedding", "unembedding"])  # fmt: skip
def test_edited_weights_stay(llama, edit):
    with torch.no_grad():
        before = llama[0](prompt())
        for model in llama:
            edits(model)[edit]()
        for _ in range(2):
            want = llama[0](prompt())
            assert not torch.equal(want, before)
            assert torch.equal(want, llama[1](prompt()))


def test_an_edit_of_weights_that_were_let_go(llama):
    streamed = llama[1]
    with torch.no_grad():
        kept = streamed.blocks[0].attn.W_Q
        streamed(prompt())
        assert "blocks.0" not in held(streamed)
        # The same object comes back while somebody holds it, and one product gives q, k and v.
        assert streamed.blocks[0].attn.W_Q is kept
        assert torch.equal(streamed(prompt()), llama[0](prompt()))
        streamed(prompt())
        streamed(prompt())
        kept.zero_()
        with pytest.raises(EditedError, match=r"blocks\.0\.attn\.W_Q was written to"):
            streamed(prompt())


def test_an_edit_of_an_embedding_that_was_let_go(llama):
    streamed = llama[1]
    pair = prompt()[:1], prompt()[1:]
    with torch.no_grad():
        for weight in (streamed.W_U, streamed.W_E):
            streamed.streaming.stream.let_go()
            weight.zero_()
            with pytest.raises(EditedError, match=r"embed\.W_[UE] was written to after"):
                sweep(streamed, *pair, metric=logit_diff(5, 9), progress=False, verify=0)
            del weight


def test_a_view_that_is_kept_never_changes(llama):
    in_memory, streamed = llama
    with torch.no_grad():
        view = streamed.blocks[0].attn.W_Q[1]
        array = streamed.blocks[1].mlp.W_in.detach().numpy()
        for _ in range(3):
            streamed(prompt())
    assert torch.equal(view, in_memory.blocks[0].attn.W_Q[1])
    assert torch.equal(torch.from_numpy(array), in_memory.blocks[1].mlp.W_in)


def test_an_edit_between_forward_and_backward(llama):
    loss = llama[1](prompt(), return_type="loss")
    with torch.no_grad():
        llama[1].blocks[0].attn.W_Q.mul_(2)
    with pytest.raises(EditedError, match="between the forward and the backward"):
        loss.backward()


# -- limits ----------------------------------------------------------------------------------------


def test_a_limit_that_is_too_small_says_what_would_do(folders):
    with pytest.raises(MemoryLimitError, match="too little for this model") as caught:
        load(folders["gpt2"], max_memory="1MB")
    needed = int(str(caught.value).split(" need ")[1].split()[0].replace(",", ""))
    model = load(folders["gpt2"], max_memory=needed + 2**24)
    with torch.no_grad():
        assert torch.equal(model(prompt()), load(folders["gpt2"])(prompt()))


def test_a_run_that_does_not_fit_is_refused_before_it_begins(folders):
    model = load(folders["gpt2"], max_memory="200MB")
    with torch.no_grad(), pytest.raises(MemoryLimitError, match="of activations were asked for"):
        model(torch.zeros(4096, 32, dtype=torch.long))
    assert held(model) == ["pos_embed"]
    with torch.no_grad():
        model(prompt())


def test_room_and_reserve(folders):
    streaming = load(folders["gpt2"], max_memory="300MB").streaming
    assert isinstance(streaming, Streaming)
    assert len(streaming.block_bytes) == 3
    room = streaming.room()
    assert 0 < room < 300e6
    with streaming.reserve(room // 2):
        pass
    with pytest.raises(MemoryLimitError, match="leaves"), streaming.reserve(room * 2):
        pass


def test_all_layers_stay_where_they_fit(folders):
    model = load(folders["gpt2"], max_memory="300MB")
    with torch.no_grad():
        model(prompt())
        read = model.streaming.stream.bytes_read
        model(prompt())
    assert model.streaming.stream.bytes_read == read


@pytest.mark.parametrize("limit, message", [("much", "is no amount"), (0, "at least one byte")])
def test_limits_that_mean_nothing(limit, message):
    with pytest.raises(ConfigError, match=message):
        stream_limit("disk", limit)


def test_offload_must_be_known():
    with pytest.raises(ConfigError, match="'disk'"):
        stream_limit("nvme", None)


# -- refusals and faults ---------------------------------------------------------------------------


def test_what_needs_all_weights_is_refused(tmp_path, llama):
    streamed = llama[1]
    calls = {
        "state_dict": streamed.state_dict,
        "load_state_dict": lambda: streamed.load_state_dict({}),
        "save_pretrained": lambda: streamed.save_pretrained(tmp_path / "new"),
        "process_weights_": streamed.process_weights_,
        "moving or casting": lambda: streamed.to(torch.float64, print_details=False),
        "copied or pickled": lambda: copy.deepcopy(streamed),
    }
    for what, call in calls.items():
        with pytest.raises(StreamError, match=what):
            call()
    with pytest.raises(StreamError, match="copied or pickled"):
        pickle.dumps(streamed)
    with pytest.raises(StreamError, match="Do this"):
        refuse_streamed(streamed, "it", "Do this.")
    refuse_streamed(llama[0], "it", "Do this.")


def test_weights_that_cannot_be_read_again(tmp_path):
    hf_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(StreamError, match="in memory"):
        HookedTransformer.from_pretrained("gpt2", hf_model=hf_model("gpt2"), offload="disk")


def test_a_file_that_changes_underneath(tmp_path):
    folder = save_folder(tmp_path / "gpt2", "gpt2")
    model = load(folder, offload="disk")
    with torch.no_grad():
        model(prompt())
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        file.write_bytes(raw[:100])
        with pytest.raises(SourceError, match="was changed since"):
            model(prompt())
        file.unlink()
        with pytest.raises(SourceError, match="cannot be opened"):
            model(prompt())


def test_weights_held_in_memory_survive_their_file(tmp_path):
    folder = save_folder(tmp_path / "gpt2", "gpt2")
    model = load(folder, offload="cpu")
    want = load(folder)
    (folder / "model.safetensors").unlink()
    with torch.no_grad():
        assert torch.equal(model(prompt()), want(prompt()))


def test_a_failing_disk(monkeypatch, tmp_path):
    from fastlens.weights import files

    model = load(save_folder(tmp_path / "gpt2", "gpt2"), offload="disk")
    real = files.read_some

    def failing(file, out, what):
        class Broken:
            def readinto(self, out):
                raise OSError(5, "Input/output error")

        return real(Broken(), out, what)

    monkeypatch.setattr("fastlens.weights.tensor_files.read_some", failing)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(SourceError, match="cannot be read: Input/output error"):
                model(prompt())
        monkeypatch.undo()
        model(prompt())


def test_a_model_that_is_gone_holds_no_weights(folders):
    model = load(folders["gpt2"], max_memory="300MB")
    with torch.no_grad():
        model(prompt())
    stream = model.streaming.stream
    assert stream.held > 0
    del model
    assert stream.held == 0


def test_sweeps_with_gradients(llama):
    found = []
    for model in llama:
        clean, corrupted = prompt()[:1], prompt()[1:]
        steer = torch.ones(32, requires_grad=True)
        scores = sweep(
            model, clean, corrupted, source=steer, mode="add", metric=logit_diff(5, 9),
            layers=[0, 1], positions=[2], gradients=True, progress=False,
        )  # fmt: skip
        scores.values.sum().backward()
        found.append(steer.grad)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_listed_weights_can_be_counted_and_not_written(llama):
    in_memory, streamed = llama
    assert streamed.n_params_total == in_memory.n_params_total
    assert [p.dtype for p in streamed.parameters()] == [p.dtype for p in in_memory.parameters()]
    assert streamed.streaming.stream.bytes_read == 0
    streamed.zero_grad()
    away = dict(streamed.named_parameters())["blocks.0.attn.W_Q"]
    assert repr(away) == "AwayParameter([4, 32, 8], torch.float32, not in memory)"
    writes = [
        lambda: away.mul_(2),
        lambda: away.data,
        lambda: away.norm(),
        lambda: away.requires_grad_(),
        lambda: away[0],
        lambda: setattr(away, "data", torch.zeros(3)),
        lambda: torch.nn.init.zeros_(away),
        streamed.init_weights,
    ]
    for write in writes:
        with torch.no_grad(), pytest.raises(StreamError, match="not in memory"):
            write()


def test_methods_of_a_cache_read_streamed_weights(folders):
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    found = []
    for offload in (None, "disk"):
        model = load(folders["llama_grouped"], offload=offload, **dict.fromkeys(names, False))
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt())
            streams = cache.accumulated_resid(apply_ln=True)
            parts, labels = cache.get_full_resid_decomposition(return_labels=True)
            found.append((streams, parts, cache.logit_attrs(parts, torch.tensor([[5], [9]]))))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
