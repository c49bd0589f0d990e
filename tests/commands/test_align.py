"""``lightning-pfl align`` on tiny models in folders: a run can use what it writes, and what is wrong it says first."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_pfl import CoLoRA, cli
from lightning_pfl.adapters import bases_of
from lightning_pfl.adapters.alignment import Alignment
from lightning_pfl.commands.align import read_texts

WORDS = ["cat", "dog", "sees", "likes", "the", "small", "large", "house", "tree", "runs"]
SHAPE = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}


def save(folder, order, build, config):
    """A tiny model whose vocabulary has the words in its own order."""
    vocabulary = {"[unk]": 0, **{f"\u2581{word}": 1 + index for index, word in enumerate(order)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]").save_pretrained(folder)
    torch.manual_seed(0)
    build(config(vocab_size=len(vocabulary), eos_token_id=None, pad_token_id=0, **SHAPE)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    llama = save(root / "llama", WORDS, LlamaForCausalLM, lambda **kw: LlamaConfig(hidden_size=16, **kw))
    gemma = save(
        root / "gemma", WORDS[::-1], Gemma3ForCausalLM, lambda **kw: Gemma3TextConfig(hidden_size=24, head_dim=8, **kw)
    )
    return llama, gemma


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(10, (6,), generator=generator)) for _ in range(60)]
    path = tmp_path_factory.mktemp("texts") / "public.jsonl"
    path.write_text("\n".join(json.dumps({"caption": line}) for line in lines) + "\n")
    return path


def run(folders, data, output, *more):
    listed = [f"--models+={folder}" for folder in folders]
    cli.main(["align", *listed, f"--data=[{data}]", f"--output={output}", "--rank=3", "--num_blocks=2", *more])


def test_the_alignment_it_writes_is_one_that_CoLoRA_uses(folders, texts, tmp_path, capsys):
    run(
        folders,
        texts,
        tmp_path / "out",
        "--field=caption",
        f"--anchor={folders[1]}",
        "--target_modules=[o_proj,down_proj]",
    )

    told = capsys.readouterr().out
    assert "60 public texts" in told
    assert "P missed" in told
    assert f"aligned='{tmp_path / 'out'}'" in told.replace("\n", "")
    alignment = Alignment.load(tmp_path / "out")
    assert sorted(fit.layer for fit in alignment.report) == ["main/0/down", "main/0/o", "main/1/down", "main/1/o"]
    assert "| main | 1 | down |" in (tmp_path / "out/report.md").read_text()

    class Finetuned(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = LlamaForCausalLM.from_pretrained(folders[0])

        def training_step(self, batch):
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Finetuned()
    colora = CoLoRA(rank=3, num_blocks=2, target_modules=["o_proj", "down_proj"], aligned=tmp_path / "out")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(fast_dev_run=True, callbacks=[colora], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randint(11, (2, 5)), batch_size=2))
    aligned = alignment.bases[alignment.report[0].model]
    for layer, (A, B) in bases_of(module).items():
        assert torch.equal(A, aligned[layer][0])
        assert torch.equal(B, aligned[layer][1])


def test_what_cannot_be_asked_for_is_refused_before_a_model_is_loaded(folders, texts, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lightning_pfl.commands.align.AutoModelForCausalLM.from_pretrained", never)
    for pair, more, message in (
        (folders, ["--anchor=other"], "--anchor"),
        (folders[:1], [], "at least two"),
        (folders, ["--rank=17", "--field=caption"], "16 wide, less than `--rank` 17"),
        (folders, ["--num_blocks=3", "--field=caption"], "has 2 blocks"),
        (folders, [], "with `text`"),
        (folders, ["--field=caption", "--max_texts=9"], "but there are 9"),
        ((folders[0], str(tmp_path / "nowhere")), ["--field=caption"], "nowhere"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(pair, texts, tmp_path / "new", *more)
    with pytest.raises(SystemExit, match=r"none\.txt"):
        run(folders, tmp_path / "none.txt", tmp_path / "new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/alignment.json").write_text("{}")
    with pytest.raises(SystemExit, match="--overwrite"):
        run(folders, texts, tmp_path / "old", "--field=caption")
    assert not (tmp_path / "new").exists()


def test_texts_come_from_lines_patterns_and_compressed_files(tmp_path):
    import gzip

    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.txt").write_text("three\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "four"}\n')

    assert read_texts([f"{tmp_path}/*.txt", f"{tmp_path}/c.jsonl.gz"]) == ["one", "two", "three", "four"]
    assert read_texts([f"{tmp_path}/*.txt"], at_most=2) == ["one", "two"]
    (tmp_path / "d.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"d.jsonl, line 1 is not a JSON mapping"):
        read_texts([str(tmp_path / "d.jsonl")])
