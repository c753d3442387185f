"""Supervised fine-tuning that minds the entropy: TRL's SFTTrainer with one method more."""
