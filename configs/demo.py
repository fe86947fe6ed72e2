"""A small model on the embedded piano, in minutes on a laptop.

python -m patchwave_jax.train --config=configs/demo.py

On two CPU cores: 3.27 bits per sample on validation (mulaw, context up to 8,000) after 160 steps.
"""

from patchwave_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    to_config_dict,
)


def get_config(arg: str = ""):
    del arg
    return to_config_dict(
        Config(
            objective="dense",
            context_samples=8_000,
            model=ModelConfig(
                patch_samples=500,
                strides=(2, 2, 2, 2),
                filters=(64, 64, 64, 32),
                width=64,
                num_layers=2,
                num_heads=4,
                head_size=64,
                mlp_width=128,
                readout_width=256,
                input="embedding",
                skip_connections=True,
                head="logistic_mixture",
                conv_dropout=0.0,
                mlp_dropout=0.0,
                head_dropout=0.0,
                token_dropout=0.0,
            ),
            data=DataConfig(dataset="piano_demo", distinct_positions=0),
            train=TrainConfig(
                batch_size=4,
                micro_batch_size=0,
                num_steps=160,
                learning_rate=2e-3,
                warmup_steps=50,
                schedule="cosine",
                decay_steps=160,
                final_learning_rate=2e-5,
                clip_norm=1.0,
                patience_evals=0,
            ),
            run=RunConfig(
                eval_every_steps=40,
                save_every_steps=40,
                eval_targets=0,
                sample_every_steps=80,
            ),
        )
    )
