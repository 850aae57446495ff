"""Layers over several devices: what maps say, and that every number and device is right.

There are no GPUs here: tensors say on which pretended one they lie, operations on tensors of two
devices are refused as CUDA refuses them, and copies between devices are recorded.
"""

import copy

import pytest
import torch

import fastlens.model.device_map as module
from fastlens import HookedEncoder, HookedTransformer, TransformerLensKeyValueCache, patching
from fastlens.config import HookedTransformerConfig
from fastlens.devices import device_of
from fastlens.errors import ConfigError
from fastlens.model.device_map import Followers, Placement, over_n_devices, parts_of, placement_of
from fastlens.train import HookedTransformerTrainConfig, train
from fastlens.weights import load
from tests.configs import TINY_CONFIGS, tiny
from tests.gpu.pretend_cuda import pretend_cuda
from tests.models import ours, prompts
from tests.weights.checkpoints import prompt, save_folder

ZERO, ONE, TWO = (torch.device("cuda", n) for n in range(3))
CPU = torch.device("cpu")


@pytest.fixture
def gpus():
    with pretend_cuda(triton=False, n_devices=3) as made:
        yield made


def over_three(cfg) -> Placement:
    """Embedding and first layer on one, other layers on the next, the unembedding on a third."""
    devices = dict.fromkeys(parts_of(cfg), ZERO)
    devices |= {f"blocks.{n}": ONE for n in range(1, cfg.n_layers)}
    devices |= {part: TWO for part in ("ln_final", "unembed") if part in devices}
    return Placement(devices)


def pair(name: str, **changes):
    """A model on one pretended GPU, and the same one over three."""
    whole = ours(name, **changes).to("cuda:0", print_details=False)
    spread = ours(name, **changes)
    spread.spread(over_three(spread.cfg))
    return whole, spread


def assert_same(found, wanted):
    assert torch.equal(found.cpu(), wanted.cpu())


# -- what a spread model computes ------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_logits_loss_and_cache_are_those_of_one_device(gpus, name):
    whole, spread = pair(name)
    tokens = prompts()
    logits, cache = spread.run_with_cache(tokens)
    wanted, reference = whole.run_with_cache(tokens)
    assert logits.device == TWO and list(cache) == list(reference)
    assert_same(logits, wanted)
    for key in cache:
        assert_same(cache[key], reference[key])
        layer = key.split(".")[1] if key.startswith("blocks.") else None
        place = TWO if key.startswith(("ln_final", "unembed")) else ZERO
        place = place if layer in (None, "0") else ONE
        assert cache[key].device == place, key
    loss = spread(tokens, return_type="loss")
    assert loss.device == TWO and loss.item() == whole(tokens, return_type="loss").item()


def test_the_stream_crosses_each_boundary_once_and_what_follows_once_a_device(gpus):
    model = ours("shortformer", n_layers=6)
    devices = {**over_three(model.cfg).devices, "blocks.3": ZERO, "blocks.4": ONE}
    model.spread(Placement(devices))
    tokens = prompts()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    gpus.forget()
    model(tokens, attention_mask=mask)
    stream, follows = (3, 11, model.cfg.d_model), (3, 11)
    moves = [(a[-1], b[-1]) for a, b, shape in gpus.crossings if shape == stream]
    # Positions go to 1 once, the stream there and back.
    assert sorted(moves) == [("0", "1"), ("0", "1"), ("0", "1"), ("1", "0"), ("1", "2")]
    assert [(a[-1], b[-1]) for a, b, shape in gpus.crossings if shape == follows] == [("0", "1")]
    assert len(gpus.crossings) == 6


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "alibi", "shortformer"])
def test_padding_keys_and_generation(gpus, name):
    whole, spread = pair(name)
    tokens = prompts(2, 7)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    assert_same(spread(tokens, attention_mask=mask), whole(tokens, attention_mask=mask))
    kept = TransformerLensKeyValueCache.init_cache(spread.cfg, spread.cfg.device, 2)
    same = TransformerLensKeyValueCache.init_cache(whole.cfg, whole.cfg.device, 2)
    for part in (tokens[:, :4], tokens[:, 4:]):
        assert_same(spread(part, past_kv_cache=kept), whole(part, past_kv_cache=same))
    assert [entry.past_keys.device for entry in kept.entries] == list(spread.placement.layers)
    for options in ({"do_sample": False}, {"do_sample": True, "freq_penalty": 1.0}):
        for use_cache in (True, False):
            made = []
            for model in (whole, spread):
                torch.manual_seed(0)
                made.append(
                    model.generate(
                        tokens, 5, stop_at_eos=False, verbose=False,
                        use_past_kv_cache=use_cache, **options,
                    )
                )  # fmt: skip
            assert_same(made[1], made[0])
            assert made[1].device == ZERO
    pieces = [*spread.generate_stream(tokens, 3, stop_at_eos=False, do_sample=False, verbose=False)]
    wanted = whole.generate(tokens, 3, stop_at_eos=False, do_sample=False, verbose=False)
    assert_same(torch.cat(pieces, 1), wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_gradients_and_hooks(gpus, name):
    whole, spread = pair(name)
    tokens = prompts()
    for model in (whole, spread):
        model(tokens, return_type="loss").backward()
    theirs = dict(whole.named_parameters())
    for key, parameter in spread.named_parameters():
        assert parameter.grad is not None and parameter.grad.device == parameter.device
        assert_same(parameter.grad, theirs[key].grad)
    seen = {}

    def double(activation, hook):
        seen[hook.name] = activation.device
        return activation * 2

    places = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"]
    hooks = [(place, double) for place in places]
    found = spread.run_with_hooks(tokens, fwd_hooks=hooks)
    assert [seen[place] for place in places] == [ZERO, ONE, ONE]
    assert_same(found, whole.run_with_hooks(tokens, fwd_hooks=hooks))
    _, cache = spread.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    _, reference = whole.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    for key in reference:
        assert_same(cache[key], reference[key])


def test_layers_can_be_run_by_themselves(gpus):
    whole, spread = pair("gpt2")
    tokens = prompts()
    half = spread(tokens, stop_at_layer=2)
    assert half.device == ONE
    assert_same(half, whole(tokens, stop_at_layer=2))
    for at in (0, 2, 3):
        stream = whole(tokens, stop_at_layer=at)
        for start in (stream, stream.to(TWO)):
            assert_same(spread(start, start_at_layer=at), whole(stream, start_at_layer=at))
    _, cache = spread.run_with_cache(tokens, names_filter="blocks.2.hook_resid_post", device="cpu")
    assert cache["resid_post", 2].device == CPU


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "post_norm"])
def test_methods_that_mix_layers_work_on_the_first_device(gpus, name):
    whole, spread = pair(name)
    tokens = prompts()
    (_, cache), (_, reference) = (model.run_with_cache(tokens) for model in (spread, whole))
    _, on_cpu = spread.run_with_cache(tokens, device="cpu")
    for method in (
        *("accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results"),
        "get_full_resid_decomposition",
    ):
        for apply_ln in (False, True):
            rows = getattr(cache, method)(None, apply_ln=apply_ln)
            assert rows.device == ZERO
            assert_same(rows, getattr(reference, method)(None, apply_ln=apply_ln))
            assert getattr(on_cpu, method)(None, apply_ln=apply_ln).device == CPU
    stack = cache.decompose_resid()
    assert_same(cache.logit_attrs(stack, 3), reference.logit_attrs(stack.to(ZERO), 3))
    row = cache["resid_post", -1][None]
    assert row.device == ONE and cache.logit_attrs(row, 3).device == ZERO
    assert cache.stack_activation("z").device == ZERO
    cache.compute_head_results()
    assert cache["result", 1].device == ONE
    onto = spread.W_U[:, :4]
    assert onto.device == TWO
    torch.testing.assert_close(
        cache.stack_neuron_results(None, project_output_onto=onto).cpu(),
        reference.stack_neuron_results(None, project_output_onto=whole.W_U[:, :4]).cpu(),
    )


def test_weights_are_stacked_on_the_first_device(gpus):
    whole, spread = pair("gpt2")
    for name in ("W_Q", "W_O", "b_in", "W_E_pos"):
        assert getattr(spread, name).device == ZERO
        assert_same(getattr(spread, name), getattr(whole, name))
    assert_same(spread.OV.AB, whole.OV.AB)
    assert_same(spread.all_composition_scores("K"), whole.all_composition_scores("K"))
    assert_same(spread.accumulated_bias(3), whole.accumulated_bias(3))


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("sites", ["resid_pre", "z", "pattern"])
def test_sweeps_are_exact(gpus, name, sites):
    # By hooked forwards, whose sums are those of a hooked forward, not of the wave.
    whole, spread = pair(name)
    metric = patching.logit_diff([3, 4], [7, 8])
    options = {"sites": sites, "metric": metric, "positions": [2, 6]}
    clean, corrupted = prompts(2, 7), prompts(2, 7, seed=5)
    found = patching.sweep(spread, clean, corrupted, verify=True, progress=False, **options)
    wanted = patching.sweep(whole, clean, corrupted, progress=False, **options)
    torch.testing.assert_close(found.values.cpu(), wanted.values.cpu(), rtol=1e-4, atol=2e-6)
    plan = patching.plan(spread, clean, corrupted, **options)
    assert "several devices" in str(plan.explain())


class Rows(torch.utils.data.Dataset):
    """Four texts to train on."""

    def __len__(self):
        return 4

    def __getitem__(self, n):
        return {"tokens": prompts(4)[n]}


def test_training_and_moving(gpus, tmp_path):
    whole, spread = pair("gpt2")
    data = Rows()
    # The pretended move makes new parameters, which the optimizer would not know.
    whole.to = lambda device: whole
    config = HookedTransformerTrainConfig(num_epochs=1, batch_size=2, print_every=None, seed=0)
    for model in (whole, spread):
        train(model, config, data)
    theirs = dict(whole.named_parameters())
    for key, parameter in spread.named_parameters():
        assert_same(parameter, theirs[key])
    assert spread.blocks[1].attn.W_Q.device == ONE
    config.device = "cuda:1"
    with pytest.raises(ConfigError, match="several devices.*Leave device=None"):
        train(spread, config, data)
    twin = copy.deepcopy(spread)
    assert_same(twin(prompts()), spread(prompts()))
    half = twin.to(torch.float64)
    assert half.blocks[1].attn.W_Q.device == ONE and half(prompts()).dtype == torch.float64
    spread.save_pretrained(tmp_path)
    gathered = spread.to("cuda:2", print_details=False)
    assert gathered.placement is None and gathered.cfg.device == "cuda:2"
    assert {p.device for p in gathered.parameters()} == {TWO}
    assert_same(gathered(prompts()), whole(prompts()))
    saved = HookedTransformer.from_pretrained(
        tmp_path, verbose=False, device="cuda:0", fold_ln=False
    )
    assert saved.W_E.device == ZERO


def test_processing_in_place(gpus):
    whole, spread = pair("gpt2")
    devices = {**over_three(spread.cfg).devices, "ln_final": ONE}
    spread.spread(Placement(devices))
    for model in (whole, spread):
        model.process_weights_()
    assert_same(spread(prompts()), whole(prompts()))


# -- loading ---------------------------------------------------------------------------------------

MAPS = {
    "gpt2": {
        "transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.h.0": 0,
        "transformer.h.1": "cuda:1", "transformer.h.2": ONE, "transformer.ln_f": 1, "lm_head": 2,
    },
    "llama_grouped": {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 1,
        "model.rotary_emb": 0, "lm_head": "cpu"},
    "neox": {"embed": 1, "blocks.0": 0, "blocks.1": 1, "ln_final": 1, "unembed": 0},
}  # fmt: skip


@pytest.mark.parametrize("case", MAPS)
def test_weights_go_straight_to_their_devices(gpus, tmp_path, monkeypatch, case):
    folder = save_folder(tmp_path / case, case)
    whole = HookedTransformer.from_pretrained(folder, verbose=False, device="cuda:0")
    device_map = dict(MAPS[case])
    if case == "neox":
        device_map |= {f"blocks.{n}": 1 for n in range(1, whole.cfg.n_layers)}
    groups = []
    store = load.store

    def watched(parameters, tensors):
        places = {str(p.device) for p in parameters.values()}
        assert places == {str(d) for d in {device_of(place) for place in device_map.values()}}
        groups.append({name.rpartition(".")[0].split(".attn")[0] for name in tensors})
        return store(parameters, tensors)

    monkeypatch.setattr(load, "store", watched)
    mapped = HookedTransformer.from_pretrained(folder, verbose=False, device_map=device_map)
    assert len(groups) > whole.cfg.n_layers
    assert mapped.cfg.device == str(mapped.embed.W_E.device)
    for part, device in mapped.placement.devices.items():
        assert {x.device for x in mapped.get_submodule(part).state_dict().values()} <= {device}
    assert_same(mapped(prompt()).cpu(), whole(prompt()))
    assert mapped.state_dict().keys() == whole.state_dict().keys()


def test_one_device_for_everything_is_no_spread(gpus, tmp_path):
    folder = save_folder(tmp_path / "m", "gpt2")
    for device_map in ({"": 1}, 1, "cuda:1", ONE):
        model = HookedTransformer.from_pretrained(folder, verbose=False, device_map=device_map)
        assert model.placement is None and model.cfg.device == "cuda:1"
        assert model(prompt()).device == ONE


def test_n_devices_means_what_it_does_in_transformer_lens(gpus, tmp_path):
    cfg = HookedTransformerConfig(**{**tiny("gpt2", n_layers=5), "device": "cuda", "n_devices": 3})
    found = over_n_devices(cfg)
    assert [place.index for place in found.layers] == [0, 0, 1, 1, 2]
    assert found.first == ZERO and found.devices["unembed"] == found.final == TWO
    model = HookedTransformer(cfg)
    assert model.placement == found and model(prompts()).device == TWO
    folder = save_folder(tmp_path / "m", "gpt2")
    loaded = HookedTransformer.from_pretrained(folder, verbose=False, n_devices=2, device="cuda")
    assert loaded.blocks[-1].attn.W_Q.device == ONE
    whole = HookedTransformer.from_pretrained(folder, verbose=False, device="cuda")
    assert_same(loaded(prompt()), whole(prompt()))
    cfg.device = "cpu"
    assert over_n_devices(cfg) is None
    with pytest.raises(ConfigError, match="n_devices=4.*there are 3"):
        HookedTransformerConfig(**{**tiny("gpt2"), "n_devices": 4})
    with pytest.raises(ConfigError, match="at least 1"):
        HookedTransformerConfig(**{**tiny("gpt2"), "n_devices": 0})


# -- maps by name ----------------------------------------------------------------------------------


def placed(device_map, name="gpt2", **options):
    cfg = HookedTransformerConfig(**tiny(name))
    return placement_of(device_map, cfg, dict.fromkeys(parts_of(cfg), 10), **options).devices


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"embed": 0, "blocks": 1, "ln_final": 1}, "leaves out pos_embed, unembed"),
        ({"": 0, "lm_head": 1}, "twice where unembed goes: by '' and by 'lm_head'"),
        ({"transformer": 0, "blocks.0": 1, "lm_head": 0}, "twice where blocks.0"),
        ({"": 0, "transformer.hh": 1}, "no such part.*Nearest.*transformer.h"),
        ({"": 0, "blocks.7": 1}, "of 3 layers has no such part"),
        ({"": 0, "blocks.0.mlp": 1}, "divides blocks.0, which stays whole"),
        ({"": "disk"}, "offload='disk'"),
        ({"": 3}, "but 3 CUDA devices exist"),
        ({"": "gpu"}, "is no device"),
        ("blanced", "one of.*Nearest: 'balanced'"),
        ("cuda:7", "but 3 CUDA devices exist"),
        ("disk", "offload='disk'"),
    ],
)
def test_maps_that_are_refused(gpus, device_map, words):
    with pytest.raises(ConfigError, match=words):
        placed(device_map)


def test_names_of_transformers_cover_what_ours_do(gpus):
    wanted = placed({"embed": 0, "pos_embed": 0, "blocks": 0, "ln_final": 0, "unembed": 1})
    assert placed({"transformer": 0, "lm_head": 1}) == wanted
    llama = placed({"model": 0, "lm_head": 1}, "llama")
    assert llama["ln_final"] == ZERO and llama["unembed"] == ONE and "pos_embed" not in llama
    neox = {"gpt_neox.embed_in": 0, "gpt_neox.layers": 1, "gpt_neox.final_layer_norm": 1}
    assert placed({**neox, "embed_out": 0}, "neox")["blocks.1"] == ONE
    # ALiBi has no weights for positions, so a map of transformers' names has no name for them.
    bloom = {"transformer.word_embeddings": 1, "transformer.h": 0, "transformer.ln_f": 0}
    assert placed({**bloom, "lm_head": 0}, "alibi")["pos_embed"] == ONE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": {"": 0}, "device": "cpu"}, "device='cpu' and device_map both"),
        ({"device_map": {"": 0}, "n_devices": 2}, "n_devices=2 and device_map both"),
        ({"device_map": "auto", "offload": "disk"}, "offload='disk' and device_map both"),
        ({"device_map": "auto", "max_memory": "2GiB"}, "max_memory='2GiB' streams"),
        ({"device_map": {"": 0}, "max_memory": {0: "2GiB"}}, "says where each part goes"),
        ({"max_memory": {0: "2GiB"}}, "there is no device_map"),
        ({"device_map": "auto", "max_memory": {"disk": "2GiB"}}, "offload='disk'"),
        ({"device_map": "auto", "move_to_device": False}, "move_to_device=False"),
        ({"n_devices": 2, "offload": "cpu"}, "n_devices=2 keeps all layers"),
    ],
)
def test_arguments_that_contradict(gpus, tmp_path, options, words):
    folder = save_folder(tmp_path / "m", "gpt2")
    with pytest.raises(ConfigError, match=words):
        HookedTransformer.from_pretrained(folder, verbose=False, **options)


def test_other_classes_run_on_one_device():
    with pytest.raises(ConfigError, match="only HookedTransformer runs on several devices"):
        HookedEncoder.from_pretrained("bert-base-cased", device_map="auto")


def test_a_streamed_model_is_not_spread(tmp_path):
    folder = save_folder(tmp_path / "m", "gpt2")
    model = HookedTransformer.from_pretrained(folder, verbose=False, offload="disk", device="cpu")
    with pytest.raises(Exception, match="spreading the model over devices"):
        model.spread(over_three(model.cfg))


# -- automatic maps --------------------------------------------------------------------------------


def spread_of(how, sizes, rooms):
    """The device of each part; ``rooms`` are bytes on GPUs 0, 1, ... and (last) on the CPU."""
    cfg = HookedTransformerConfig(**tiny("llama", n_layers=len(sizes) - 3))
    max_memory = {**dict(enumerate(rooms[:-1])), "cpu": rooms[-1]}
    named = dict(zip(parts_of(cfg), sizes, strict=True))
    found = placement_of(how, cfg, named, max_memory=max_memory).devices
    assert list(found) == parts_of(cfg)
    return "".join("c" if place == CPU else str(place.index) for place in found.values())


@pytest.mark.parametrize(
    ("how", "rooms", "found"),
    [
        ("auto", (1000, 1000, 0), "00000" + "1111"),
        ("balanced", (1000, 1000, 1000), "00000" + "1111"),
        ("balanced", (1000, 1000, 1000, 0), "000" + "111" + "222"),
        ("balanced", (25, 1000, 0), "00" + "1111111"),
        ("balanced_low_0", (1000, 1000, 1000, 0), "11111" + "2222"),
        ("balanced_low_0", (1000, 40, 40, 0), "0" + "1111" + "2222"),
        ("sequential", (45, 1000, 0), "0000" + "11111"),
        ("auto", (25, 25, 1000), "00" + "11" + "ccccc"),
        ("sequential", (0, 1000, 0), "1" * 9),
    ],
)
def test_automatic_maps(gpus, how, rooms, found):
    assert spread_of(how, [10] * 9, rooms) == found


def test_an_automatic_map_never_takes_more_than_it_may(gpus):
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        sizes = torch.randint(1, 30, (9,), generator=generator).tolist()
        rooms = [*torch.randint(30, 120, (3,), generator=generator).tolist(), 0]
        for how in ("balanced", "balanced_low_0", "sequential"):
            try:
                found = spread_of(how, sizes, rooms)
            except ConfigError as error:
                assert "do not fit" in str(error)
                # What does not fit in order, each device filled in turn, does not fit at all.
                with pytest.raises(ConfigError):
                    spread_of("sequential", sizes, rooms)
                continue
            assert found == "".join(sorted(found))
            for n, room in enumerate(rooms):
                assert (
                    sum(s for s, place in zip(sizes, found, strict=True) if place == str(n)) <= room
                )


def test_an_automatic_map_reads_what_is_free(gpus, tmp_path, monkeypatch):
    folder = save_folder(tmp_path / "m", "gpt2")
    model = HookedTransformer.from_pretrained(folder, verbose=False, device_map="auto")
    assert set(model.placement.devices.values()) == {ZERO, ONE, TWO}
    free = {ZERO: 100, ONE: 10**9, TWO: 10**9, CPU: 10**9}
    monkeypatch.setattr(module, "free_bytes", lambda place: free[place])
    model = HookedTransformer.from_pretrained(folder, verbose=False, device_map="sequential")
    assert model.placement is None and model.cfg.device == "cuda:1"
    amounts = {0: "40KiB", 1: "1GiB"}
    model = HookedTransformer.from_pretrained(
        folder, verbose=False, device_map="sequential", max_memory=amounts
    )
    sizes = module.part_sizes(model, model.cfg)
    on_first = [size for part, size in sizes.items() if model.placement.devices[part] == ZERO]
    assert 0 < sum(on_first) <= 40 * 1024
    with pytest.raises(ConfigError, match="do not fit.*cuda:0: 1 KiB"):
        HookedTransformer.from_pretrained(
            folder, verbose=False, device_map="auto", max_memory={0: "1KiB"}
        )


def test_without_gpus_everything_is_on_the_cpu(tmp_path, monkeypatch):
    folder = save_folder(tmp_path / "m", "gpt2")
    put, found = Placement.put, []

    def watched(placement, model):
        # Memory is taken where the weights will be, and nowhere before.
        found.extend(p.is_meta for p in model.parameters())
        put(placement, model)

    monkeypatch.setattr(Placement, "put", watched)
    model = HookedTransformer.from_pretrained(folder, verbose=False, device_map="auto")
    whole = HookedTransformer.from_pretrained(folder, verbose=False, device="cpu")
    assert model.placement is None and torch.equal(model(prompt()), whole(prompt()))
    assert len(found) == len([*model.parameters()]) and all(found)
    assert all(p.requires_grad for p in model.parameters())


# -- parts -----------------------------------------------------------------------------------------


def test_followers_are_copied_once_a_device(gpus):
    x = torch.ones(2).to("cuda:0")
    follow = Followers(x, None)
    gpus.forget()
    first = follow.on(ONE)
    assert first[0].device == ONE and first[1] is None and follow.on(ONE)[0] is first[0]
    assert follow.on(ZERO)[0] is x and len(gpus.crossings) == 1


def test_a_half_on_meta_moves_alone():
    model = ours("gpt2")
    devices = {**dict.fromkeys(parts_of(model.cfg), CPU), "unembed": torch.device("meta")}
    model.spread(Placement(devices))
    logits = model(prompts())
    assert logits.is_meta and logits.shape == (3, 11, model.cfg.d_vocab)
    assert model(prompts(), stop_at_layer=3).device == CPU
    assert not model.placement.is_single and model.placement.after(model) == model.placement
