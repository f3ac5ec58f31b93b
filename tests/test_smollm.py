"""Backbone weights and tokenizer out of GGUF: the row order by itself, the real file against transformers."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import GgufConfig

from mosear.errors import CheckpointError
from mosear_export.demo.fetch import DemoFiles
from mosear_export.demo.smollm import GGUFModel, _halves

TEXTS = (
    "The face looks happy, but the voice sounds sad.",
    "<|im_start|>user\nWhich emotion?<|im_end|>\n<|im_start|>assistant\n",
    "I'd say: it's 100% anger (0.97)... or 3 1/2 things, born 2024!",
    "  two  spaces\tand\n\nlines ",
    "Über größe, naïve café, 日本語 😀 привет",
    "",
)


@pytest.fixture(scope="module")
def model(demo_files: DemoFiles) -> GGUFModel:
    return GGUFModel(demo_files.gguf)


def test_rows_of_a_head_go_back_from_pairs_to_halves() -> None:
    # llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute
    weight = torch.arange(2 * 6 * 3.0).view(12, 3)
    permuted = weight.numpy().reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    assert _halves(torch.from_numpy(permuted.copy()), heads=2).equal(weight)


def test_a_file_that_is_no_llama_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model, only a line of text that is long enough")
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        GGUFModel(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="of type bert"):
        GGUFModel(tmp_path / "bert.gguf")


def test_a_llama_without_its_fields_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"lacks the field llama\.embedding_length"):
        GGUFModel(tmp_path / "empty.gguf").config()
    with pytest.raises(CheckpointError, match="tokenizer of type"):
        GGUFModel(tmp_path / "empty.gguf").tokenizer()


@pytest.mark.demo
def test_the_model_speaks(model: GGUFModel) -> None:
    shape, tokenizer = model.config(), model.tokenizer()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.tied_embeddings,
            eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        )
    ).eval()
    left = llama.load_state_dict(model.tensors(), strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(question).ids])
    answer = llama.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert tokenizer.decode(answer.tolist()) == "The capital of France is Paris."


@pytest.mark.demo
@pytest.mark.full
def test_tensors_and_tokens_are_those_of_transformers(model: GGUFModel, demo_files: DemoFiles, tmp_path: Path) -> None:
    folder, name = demo_files.gguf.parent, demo_files.gguf.name
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(gguf_file=name, dequantize=True)
    )
    expected, config = theirs.state_dict(), model.config()
    assert expected.pop("lm_head.weight").equal(expected["model.embed_tokens.weight"])
    actual = model.tensors()
    assert actual.keys() == expected.keys() and all(actual[key].equal(expected[key]) for key in actual)
    assert config.norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    assert config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    assert (config.layers, config.heads, config.kv_heads) == (30, 9, 3) and config.tied_embeddings

    model.tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours, other = (
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        AutoTokenizer.from_pretrained(folder, gguf_file=name),
    )
    assert ours.get_vocab_size() == config.vocab_size == len(other)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == other(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.demo
def test_spaces_before_a_digit_stay_together(model: GGUFModel) -> None:
    """As `pre = smollm` says; transformers reads GPT-2's pattern alone out of a GGUF and splits them."""
    assert model.tokenizer().encode("a  1").tokens == ["a", "ĠĠ", "1"]
