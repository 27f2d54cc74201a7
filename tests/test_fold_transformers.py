"""Folding BERT, GPT-2 and Llama, as transformers builds them, from small random configurations."""

import pytest
import torch
from torch import nn

import tetris
from tetris.prune import Part, SharedOrder

transformers = pytest.importorskip("transformers", reason="needs transformers, of tetris[test]")

BLOCKS = {"sparsity": 0.5, "block": (4, 4), "sweeps": 2}
TOKENS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def bert(kind="BertForSequenceClassification"):
    config = transformers.BertConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return prepared(getattr(transformers, kind)(config))


def llama():
    config = transformers.LlamaConfig(
        **SIZES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return prepared(transformers.LlamaForCausalLM(config))


def gpt2():
    """With ``Conv1D``, which holds the transposed weight."""
    config = transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return prepared(transformers.GPT2LMHeadModel(config))


def prepared(model):
    """In eval mode, with biases and norms that tell channels apart."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def inputs(model):
    cached = not isinstance(model, transformers.BertPreTrainedModel)
    return {"input_ids": TOKENS, **({"use_cache": False} if cached else {})}


def check(model, **settings):
    """Prunes and folds a model, compares; the folded model, the pruned one, and the report."""
    example = inputs(model)
    orders = tetris.shared_orders(model, example)
    assert not orders.free
    sparse = tetris.sparsify(model, share=orders, **BLOCKS, **settings)
    folded, report = tetris.fold(sparse, example, return_report=True)
    assert report.before > 0
    assert (report.after, dict(report.kept), report.untraced) == (0, {}, None)
    with torch.no_grad():
        expected = sparse(**example).logits
        torch.testing.assert_close(folded(**example).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, model(**example).logits, atol=1e-3)
    return folded, sparse, orders


def test_bert():
    model = bert()
    folded, sparse, orders = check(model)
    assert isinstance(folded, transformers.BertForSequenceClassification)
    attention = "bert.encoder.layer.0.attention"
    query, key, value = (f"{attention}.self.{name}" for name in ("query", "key", "value"))
    heads = [range(i, i + 8) for i in range(0, 32, 8)]
    for head in heads:
        assert SharedOrder(rows=(Part(query, head), Part(key, head))) in orders.orders
        output = f"{attention}.output.dense"
        assert SharedOrder(Part(value, head), Part(output, head)) in orders.orders
    assert dict(orders.held) == {("classifier", "rows"): "it is an output of the model"}
    (stream,) = (o for o in orders if f"{attention}.output.dense" in o.rows)
    assert len(stream.rows) == 2 * 2
    assert len(stream.cols) == 2 * 4 + 1
    with torch.no_grad():  # other shapes, a mask
        more = {"input_ids": TOKENS[:, :4].repeat(3, 1), "attention_mask": torch.ones(6, 4).tril()}
        a, b = (m(**more).logits for m in (folded, sparse))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        dense = folded.bert.embeddings.word_embeddings.weight
    assert not torch.equal(dense, model.bert.embeddings.word_embeddings.weight)


def test_bert_with_tied_embeddings():
    """The decoder is the table of embeddings: its inputs are in the order of the stream."""
    folded, _, orders = check(bert("BertForMaskedLM"), exclude="*.decoder")
    assert folded.cls.predictions.decoder.weight is folded.bert.embeddings.word_embeddings.weight
    (stream,) = (o for o in orders if "cls.predictions.transform.dense" in o.rows)
    assert "bert.encoder.layer.1.output.dense" in stream.rows


def test_the_stream_of_a_bare_encoder_is_its_output():
    model = bert("BertModel")
    orders = tetris.shared_orders(model, inputs(model))
    why = orders.held["bert.encoder.layer.0.output.dense".removeprefix("bert."), "rows"]
    assert why == "it is an output of the model"


def test_llama():
    model = llama()
    folded, sparse, orders = check(model)
    layer = "model.layers.1"
    for name in ("q_proj", "k_proj"):  # rotary embeddings
        assert "whose order is given" in orders.held[f"{layer}.self_attn.{name}", "rows"]
    value, output = f"{layer}.self_attn.v_proj", f"{layer}.self_attn.o_proj"
    shared = (Part(output, range(8)), Part(output, range(8, 16)))  # two heads with one value
    assert SharedOrder(Part(value, range(8)), shared) in orders.orders
    gated = SharedOrder(
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
    )
    assert gated in orders.orders
    with torch.no_grad():
        step = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
        assert torch.equal(folded.generate(TOKENS, **step), sparse.generate(TOKENS, **step))


def test_a_cache_that_is_returned_hides_what_is_around_it():
    """Its type is none that graphs know: parts are traced, and the report says what to pass."""
    model = llama()
    orders = tetris.shared_orders(model, {"input_ids": TOKENS})
    mlp = "model.layers.0.mlp"
    gated = SharedOrder((f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{mlp}.down_proj")
    assert gated in orders.orders
    assert "use_cache=False" in orders.free["lm_head", "rows"]
    assert "DynamicCache" in orders.free["model.layers.0.self_attn.v_proj", "rows"]


def test_gpt2():
    model = gpt2()
    folded, _, orders = check(model, exclude="lm_head")
    fused = "transformer.h.0.attn.c_attn"
    assert SharedOrder(rows=(Part(fused, range(8)), Part(fused, range(32, 40)))) in orders.orders
    assert folded.lm_head.weight is folded.transformer.wte.weight


def test_layers_that_stay_dense_carry_channels():
    """The ``Conv1D`` layers are put into the order of the only sparse one."""
    config = transformers.GPT2Config(**SIZES, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = prepared(transformers.GPT2LMHeadModel(config))
    model.lm_head = nn.Linear(32, 50, bias=False)
    sparse = tetris.sparsify(model, include="lm_head", **BLOCKS)
    assert sparse.lm_head.col_perm is not None
    folded, report = tetris.fold(sparse, inputs(model), return_report=True)
    assert folded.lm_head.col_perm is None
    assert "transformer.h.0.attn.c_attn.weight" in report.orders[0].tensors
    assert set(report.kept) == {("lm_head", "rows")}
