"""Put an image tower beside an LLM or a vision-language model and save the result, ready to be trained.

    lmfusion adapt SmolLM2-135M-Instruct.Q4_1.gguf models/digits --image-width 128 --codec pixels --channels 1 \\
        --image-size 8 --patch-coder linear
    lmfusion adapt meta-llama/Meta-Llama-3-8B models/llama --codec autoencoder_kl --codec-path models/vae

The base LLM is a Hugging Face folder (Llama, SmolLM2, Mistral, Qwen2, Qwen3; safetensors), a GGUF file, or a name on
the hub; or, as a folder or a name, a vision-language model around such an LLM (LLaVA-NeXT, LLaVA), which keeps seeing
with its own encoder. The saved model holds the image part alone, and of the base its place and the sha256 of every
tensor.
"""

import argparse

HELP = "make a model out of an LLM or a vision-language model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the LLM or VLM: Hugging Face folder, GGUF file, or name on the hub")
    parser.add_argument("output", help="folder to save the model in")
    tower = parser.add_argument_group("image tower")
    tower.add_argument("--image-width", type=int, metavar="N", help="its hidden size; default: the LLM's (a full copy)")
    tower.add_argument(
        "--image-ffn-width", type=int, metavar="N", help="its FFN width; default: scaled with --image-width"
    )
    tower.add_argument(
        "--separation",
        choices=("deep", "shallow", "none"),
        default="deep",
        help="own weights throughout, own feed-forward network alone, or none (default: deep)",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--codec",
        choices=("pixels", "autoencoder_kl", "autoencoder_tiny"),
        default="pixels",
        help="what diffusion works on: pixels, or the latents of a diffusers autoencoder (default: pixels)",
    )
    images.add_argument("--codec-path", metavar="FOLDER", help="folder of the autoencoder")
    images.add_argument("--image-size", type=int, metavar="N", help="pixels a side (default: 256)")
    images.add_argument("--channels", type=int, choices=(1, 3), help="1: grey, 3: RGB (default: 3)")
    images.add_argument("--patch-coder", choices=("unet", "linear"), help="latents to rows and back (default: unet)")
    images.add_argument(
        "--patch-size", type=int, metavar="N", help="latent pixels a row stands for, along a side (default: 2)"
    )
    images.add_argument(
        "--prediction", choices=("epsilon", "v_prediction"), help="what the diffusion predicts (default: epsilon)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the checkpoint's"
    )
    parser.add_argument("--parts", choices=("image", "all"), default="image", help="what to save (default: image)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that are drawn (default: 0)")


def run(args: argparse.Namespace) -> int:
    import torch

    from lmfusion.conversion import load_base
    from lmfusion.model.modeling import LMFusion

    patch_coder = _given(kind=args.patch_coder, patch_size=args.patch_size)
    image = _given(hidden_size=args.image_width, intermediate_size=args.image_ffn_width, separation=args.separation)
    codec = _given(kind=args.codec, path=args.codec_path, image_size=args.image_size, channels=args.channels)
    model = LMFusion.from_base(
        load_base(args.base, None if args.dtype is None else getattr(torch, args.dtype)),
        image={**image, "patch_coder": patch_coder},
        codec=codec,
        diffusion=_given(prediction_type=args.prediction),
        seed=args.seed,
    )
    num_tokens = model.tokens_per_image  # complains where codec and patch coder do not fit
    model.save_pretrained(args.output, parts=args.parts)
    num_image, num_text = (sum(p.numel() for p in tower.parameters()) for tower in (model.image, model.text))
    seeing = ""
    if model.vision is not None:
        seeing = f" and {sum(p.numel() for p in model.vision.parameters()) / 1e6:.1f} M vision"
    print(
        f"{args.output}: {num_text / 1e6:.1f} M frozen text{seeing} parameters, {num_image / 1e6:.1f} M image "
        f"parameters to train, {num_tokens} rows an image"
    )
    return 0


def _given(**options: object) -> dict[str, object]:
    """Options that were given; the rest keep the defaults of the configuration classes."""
    return {name: value for name, value in options.items() if value is not None}
