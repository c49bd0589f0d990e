"""`CoLoRA` without a federation: an ordinary PEFT callback for an ordinary Trainer."""

import lightning as L
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pfl import CoLoRA


def base_model():
    """A tiny random Llama; with network, `AutoModelForCausalLM.from_pretrained(...)`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Tuner(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = base_model()

    def training_step(self, batch, _):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(CoLoRA.param_groups(self, lr=1e-3, lr_pq=5e-3))


def main():
    L.seed_everything(0)
    sequences = torch.arange(16).repeat(32, 1) + torch.randint(0, 40, (32, 1))  # count upwards from anywhere
    module = Tuner()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[CoLoRA(rank=8, alpha=16, num_blocks=2)],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(sequences, batch_size=8, shuffle=True))

    CoLoRA.export(module, "adapter")
    again = PeftModel.from_pretrained(base_model(), "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(sequences[:2]).logits, module.model(sequences[:2]).logits)
    print("PEFT reads the exported adapter and gives the same logits.")


if __name__ == "__main__":
    main()
