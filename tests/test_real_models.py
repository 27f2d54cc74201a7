"""Whole networks as people have them: transformers' own classes, a CNN and an MLP-Mixer.

Small random configurations; what must hold is that a sparse model computes what the dense one does
with the weights that were kept.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tetris

transformers = pytest.importorskip("transformers", reason="needs transformers, of tetris[test]")

SETTINGS = {"sparsity": 0.5, "block": (4, 4), "sweeps": 1}
SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TOKENS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert(attention="sdpa", kind="BertForSequenceClassification"):
    config = transformers.BertConfig(**SIZES, **ENCODER, attn_implementation=attention)
    return getattr(transformers, kind)(config)


def gpt2(attention="sdpa", activation="gelu_pytorch_tanh"):
    config = transformers.GPT2Config(
        **SIZES,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        activation_function=activation,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(attention="sdpa", **changes):
    config = transformers.LlamaConfig(
        **SIZES, **ENCODER, num_key_value_heads=2, attn_implementation=attention, **changes
    )
    return transformers.LlamaForCausalLM(config)


def vit(attention="sdpa"):
    config = transformers.ViTConfig(
        **ENCODER, image_size=16, patch_size=4, num_labels=10, attn_implementation=attention
    )
    return transformers.ViTForImageClassification(config)


def t5(feed_forward):
    config = transformers.T5Config(
        **SIZES,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=2,
    )
    return transformers.T5ForConditionalGeneration(config)


class Block(nn.Module):
    """A residual block as timm writes it: norms and activations are modules, two called twice."""

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(x + shortcut)


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 32, 2),
        Block(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Mlp(nn.Module):
    def __init__(self, features, hidden):
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Mixer(nn.Module):
    """MLP-Mixer whose blocks share the MLP over channels: a layer called several times."""

    def __init__(self, patches=16, features=32, depth=2):
        super().__init__()
        self.stem = nn.Conv2d(3, features, 4, 4)
        self.tokens = nn.ModuleList(Mlp(patches, 24) for _ in range(depth))
        self.channels = Mlp(features, 48)
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2 * depth + 1))
        self.head = nn.Linear(features, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        for block, before, between in zip(
            self.tokens, self.norms[::2], self.norms[1::2], strict=False
        ):
            x = x + block(before(x).mT).mT
            x = x + self.channels(between(x))
        return self.head(self.norms[-1](x).mean(1))


MODELS = {
    "bert": (bert, {}),
    "bert-eager": (lambda: bert("eager"), {}),
    "bert-mlm": (lambda: bert(kind="BertForMaskedLM"), {"exclude": "*.decoder"}),
    "gpt2": (gpt2, {"exclude": "lm_head"}),
    "gpt2-eager": (lambda: gpt2("eager"), {"exclude": "lm_head"}),
    "llama": (llama, {}),
    "llama-eager": (lambda: llama("eager"), {}),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), {"exclude": "lm_head"}),
    "t5": (lambda: t5("relu"), {"exclude": "lm_head"}),
    "t5-gated": (lambda: t5("gated-gelu"), {"exclude": "lm_head"}),
    "vit": (vit, {}),
    "cnn": (cnn, {}),
    "mixer": (Mixer, {}),
}


def build(name):
    """A model in eval mode whose biases and norms tell channels apart."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def arguments_of(model):
    """What a model needs beside its input."""
    both = isinstance(model, transformers.T5ForConditionalGeneration)
    return {"decoder_input_ids": TOKENS} if both else {}


def outputs(model):
    reads_text = any(isinstance(module, nn.Embedding) for module in model.modules())
    with torch.no_grad():
        y = model(TOKENS if reads_text else IMAGES, **arguments_of(model))
    return y if isinstance(y, torch.Tensor) else y.logits


def masked(dense, sparse):
    """The dense model with the weights that the sparse one's layouts keep."""
    result = copy.deepcopy(dense)
    count = 0
    for name, layer in sparse.named_modules():
        if not isinstance(layer, tetris.nn.SparseLayer):
            continue
        weight = result.get_submodule(name).weight
        mask = layer.layout.mask()
        kind = type(layer)
        if kind in (tetris.SparseTransposedLinear, tetris.SparseConvTranspose2d):
            mask = mask.transpose(0, 1)
        weight.data.mul_(mask)
        count += 1
    assert count
    return result


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_model_is_the_masked_dense_one(name, tmp_path):
    dense = build(name)
    sparse = tetris.sparsify(dense, **SETTINGS, **MODELS[name][1])
    want, got = outputs(masked(dense, sparse)), outputs(sparse)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(dense), want, atol=1e-3)  # something was removed

    again = tetris.densify(sparse)
    assert [*again.state_dict()] == [*dense.state_dict()]
    torch.testing.assert_close(outputs(again), want, rtol=1e-4, atol=1e-4)

    path = tmp_path / "model.safetensors"
    tetris.save(sparse, path)
    assert torch.equal(outputs(tetris.load(path, build(name))), got)

    if name.startswith("t5"):  # it compares types in forward, which cannot be traced
        with pytest.raises(ValueError, match="cannot be traced.*no activation behind a sparse"):
            tetris.fuse(sparse)
        return
    fused, report = tetris.fuse(sparse, return_report=True)
    torch.testing.assert_close(outputs(fused), want, rtol=1e-4, atol=1e-4)
    assert {layer.activation for layer in report.fused} & {"gelu", "gelu_tanh", "silu", "relu"}


def test_an_activation_that_is_written_out_is_not_fused():
    sparse = tetris.sparsify(gpt2(activation="gelu_new").eval(), **SETTINGS, exclude="lm_head")
    with pytest.raises(ValueError, match="cannot be traced.*no activation behind a sparse layer"):
        tetris.fuse(sparse)


@pytest.mark.parametrize("name", ["vit", "gpt2", "t5", "mixer"])
def test_folding_leaves_the_outputs(name):
    dense = build(name)
    example = IMAGES
    if name in ("gpt2", "t5"):
        example = {"input_ids": TOKENS, "use_cache": False, **arguments_of(dense)}
    orders = tetris.shared_orders(dense, example)
    sparse = tetris.sparsify(dense, share=orders, **SETTINGS, **MODELS[name][1])
    folded, report = tetris.fold(sparse, example, return_report=True)
    assert report.after < report.before
    torch.testing.assert_close(outputs(folded), outputs(sparse), rtol=1e-4, atol=1e-4)
    want = outputs(masked(dense, sparse))
    torch.testing.assert_close(outputs(folded), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
def test_every_projection_becomes_sparse(name):
    dense = build(name)
    settings = {**SETTINGS, "reorder": False, **MODELS[name][1]}
    _, report = tetris.sparsify(dense, **settings, return_report=True)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    projections = {n for n, m in dense.named_modules() if isinstance(m, kinds)}
    assert {layer.name for layer in report.layers} == projections - {settings.get("exclude")}
    some = {
        "bert": "bert.encoder.layer.1.attention.self.value",
        "gpt2": "transformer.h.1.attn.c_attn",
        "llama": "model.layers.1.self_attn.k_proj",
    }
    assert some.get(name, "classifier") in projections


@pytest.mark.parametrize(
    ("name", "head", "table"),
    [
        ("gpt2", "lm_head", "transformer.wte.weight"),
        ("llama-tied", "lm_head", "model.embed_tokens.weight"),
        ("bert-mlm", "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_a_head_that_is_the_table_of_embeddings_is_refused_by_name(name, head, table):
    model = build(name)
    with pytest.raises(ValueError, match=f"'{head}' shares its weight with '{table}'.*exclude"):
        tetris.sparsify(model, **SETTINGS)
    sparse = tetris.sparsify(model, **SETTINGS, exclude=head)
    assert sparse.get_submodule(head).weight is sparse.get_parameter(table)


def test_generation_with_a_cache():
    """Prompt at once, then token by token: the few-token kernels."""
    for name in ("llama", "gpt2", "t5"):
        dense = build(name)
        sparse = tetris.sparsify(dense, **SETTINGS, **MODELS[name][1])
        step = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 2}
        mask = torch.ones_like(TOKENS)
        want = masked(dense, sparse).generate(TOKENS, attention_mask=mask, **step)
        assert torch.equal(sparse.generate(TOKENS, attention_mask=mask, **step), want)


def test_gradients_of_a_layer_called_several_times():
    dense = build("mixer")
    sparse = tetris.sparsify(dense, **SETTINGS)
    reference = masked(dense, sparse)
    F.cross_entropy(sparse(IMAGES), torch.tensor([1, 7])).backward()
    F.cross_entropy(reference(IMAGES), torch.tensor([1, 7])).backward()
    layer, want = sparse.channels.fc1, reference.channels.fc1.weight.grad
    got = layer.layout.unpack(layer.values.grad)
    torch.testing.assert_close(got, want * layer.layout.mask(), rtol=1e-4, atol=1e-6)


# -- Conv1D -----------------------------------------------------------------------------------


def conv1d(out=20, in_=12):
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(out, in_)
    nn.init.uniform_(layer.bias)
    return layer


def test_conv1d_there_and_back():
    dense = conv1d()
    sparse = tetris.SparseTransposedLinear.from_dense(dense, sparsity=0.5, block=(4, 2))
    assert (sparse.in_features, sparse.out_features) == (12, 20)
    x = torch.randn(3, 5, 12)
    weight = dense.weight * sparse.layout.mask().T
    torch.testing.assert_close(sparse(x), x @ weight + dense.bias, rtol=1e-4, atol=1e-5)

    before = torch.get_rng_state()
    again = sparse.to_dense()
    assert torch.equal(torch.get_rng_state(), before)  # Conv1D draws a weight when it is made
    assert type(again) is type(dense)
    assert torch.equal(again.weight, weight)
    assert torch.equal(again.bias, dense.bias)
    assert again.weight.is_contiguous()
    assert sparse.weight.shape == dense.weight.shape  # what it says of a weight it has not
    assert torch.equal(sparse(x=x), sparse(x))  # as Conv1D calls its input


def test_conv1d_is_told_from_its_subclasses_and_namesakes():
    class Odd(transformers.pytorch_utils.Conv1D):
        """Its forward is its own."""

    class Conv1D(nn.Module):
        weight = nn.Parameter(torch.randn(8, 8))

    model = nn.Sequential(conv1d(8, 8), Odd(8, 8), Conv1D())
    sparse, report = tetris.sparsify(model, **SETTINGS, return_report=True)
    assert [layer.name for layer in report.layers] == ["0"]
    assert "pass types= if it is an ordinary Conv1D" in report.skipped["1"]
    assert set(report.skipped) == {"1"}
    types = (transformers.pytorch_utils.Conv1D, Odd)
    sparse = tetris.sparsify(model, **SETTINGS, types=types)
    assert isinstance(sparse[1], tetris.SparseTransposedLinear)
    with pytest.raises(TypeError, match=r"must be an transformers\.pytorch_utils\.Conv1D .*Linear"):
        tetris.SparseTransposedLinear.from_dense(nn.Linear(4, 4), sparsity=0.5)


def test_a_file_of_conv1d_is_refused_by_linear(tmp_path):
    sparse = tetris.sparsify(nn.Sequential(conv1d(16, 16)), **SETTINGS)
    tetris.save(sparse, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"SparseTransposedLinear.*transformers.*Conv1D.*Linear"):
        tetris.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(16, 16)))


def test_regrowth_of_conv1d_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = conv1d(16, 16)

        def forward(self, x):
            return self.layer(x=x)

    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = tetris.prune.TetrisPruner(
        model,
        execution="sparse",
        optimizers=optimizer,
        regrow=tetris.prune.Regrow(0.5, every=1),
        **SETTINGS,
    )
    before = pruner.layouts()["layer"]
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    pruner.step()
    after = pruner.layouts()["layer"]
    assert isinstance(model.layer, tetris.SparseTransposedLinear)
    assert before != after
    assert before.nnz_blocks == after.nnz_blocks


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_pruning_gpt2_while_it_trains(execution):
    model = build("gpt2").train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    pruner = tetris.prune.TetrisPruner(
        model,
        exclude="lm_head",
        execution=execution,
        optimizers=optimizer,
        schedule=tetris.prune.Cubic(begin=0, end=2, every=1),
        **SETTINGS,
    )
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).logits.flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
        pruner.step()
    want = outputs(model.eval())
    sparse = pruner.finalize()
    torch.testing.assert_close(outputs(sparse), want, rtol=1e-4, atol=1e-4)
    layer = sparse.transformer.h[0].mlp.c_fc
    assert isinstance(layer, tetris.SparseTransposedLinear)
    assert layer.layout.sparsity == 0.5


def test_vrpge_with_conv1d():
    model = build("gpt2").train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    pruner = tetris.prune.VRPGEPruner(model, exclude="lm_head", optimizers=optimizer, **SETTINGS)
    for _ in range(2):
        optimizer.zero_grad()
        pruner.backward(lambda: model(TOKENS).logits.square().mean())
        optimizer.step()
        pruner.step()
    pruner.prune()
    want = outputs(model.eval())
    torch.testing.assert_close(outputs(pruner.finalize()), want, rtol=1e-4, atol=1e-4)


def test_importance_and_targets_with_conv1d():
    model = build("gpt2")

    def loss(y):
        return y.logits.square().mean()

    for importance in (
        tetris.prune.Taylor([TOKENS], loss),
        tetris.prune.ActivationNorm([TOKENS]),
    ):
        sparse = tetris.sparsify(model, **SETTINGS, importance=importance, exclude="lm_head")
        assert outputs(sparse).isfinite().all()
    target = tetris.prune.Flops(0.25, TOKENS)
    sparse = tetris.sparsify(
        model, target=target, block=(4, 4), reorder=False, exclude="lm_head", scope="global"
    )
    layers = [m for m in sparse.modules() if isinstance(m, tetris.nn.SparseLayer)]
    dense = sum(m.in_features * m.out_features for m in layers)
    assert sum(m.values.numel() for m in layers) <= 0.25 * dense


# -- compilers --------------------------------------------------------------------------------


class Logits(nn.Module):
    """Logits alone, without a cache of keys and values."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.names = [*arguments_of(model)]

    def forward(self, x):
        return self.model(x, use_cache=False, **dict.fromkeys(self.names, x)).logits


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-gated"])
def test_any_batch_compiles_and_exports_once(name):
    torch.compiler.reset()
    model = Logits(tetris.sparsify(build(name), **SETTINGS, **MODELS[name][1])).eval()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (TOKENS,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for copies in (1, 2, 3):
            x = TOKENS.repeat(copies, 1)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
