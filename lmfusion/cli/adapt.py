"""Add an image tower to an LLM or a vision-language model, and save the result, ready to be trained.

    lmfusion adapt SmolLM2-135M-Instruct.Q4_1.gguf models/digits --image-width 128 --codec pixels --channels 1 \\
        --image-size 8 --patch-coder linear
    lmfusion adapt meta-llama/Meta-Llama-3-8B models/llama --codec autoencoder_kl --codec-path models/vae

The base is an LLM: a Hugging Face folder (Llama, SmolLM2, Mistral, Qwen2, Qwen3; safetensors), a GGUF file, or a name
on the hub. It may also be a folder or name of a vision-language model around such an LLM (LLaVA-NeXT, LLaVA), which
keeps its own vision encoder. The saved model holds only the image part, the path of the base, and the sha256 of each of
the base's tensors.
"""

import argparse

HELP = "add an image tower to an LLM or a vision-language model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the LLM or VLM: Hugging Face folder, GGUF file, or name on the hub")
    parser.add_argument("output", help="folder to save the model in")
    tower = parser.add_argument_group("image tower")
    tower.add_argument("--image-width", type=int, metavar="N", help="hidden size (default: the LLM's, a full copy)")
    tower.add_argument(
        "--image-ffn-width",
        type=int,
        metavar="N",
        help="width of the feed-forward network (default: scaled with --image-width)",
    )
    tower.add_argument(
        "--separation",
        choices=("deep", "shallow", "none"),
        default="deep",
        help="own weights throughout, only an own feed-forward network, or no own weights (default: deep)",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--codec",
        choices=("pixels", "autoencoder_kl", "autoencoder_tiny"),
        default="pixels",
        help="diffusion of pixels, or of the latents of a diffusers autoencoder (default: pixels)",
    )
    images.add_argument("--codec-path", metavar="FOLDER", help="folder of the autoencoder")
    images.add_argument("--image-size", type=int, metavar="N", help="pixels per side (default: 256)")
    images.add_argument("--channels", type=int, choices=(1, 3), help="1: grey, 3: RGB (default: 3)")
    images.add_argument(
        "--patch-coder", choices=("unet", "linear"), help="from latents to tokens and back (default: unet)"
    )
    images.add_argument("--patch-size", type=int, metavar="N", help="latent pixels per side of one token (default: 2)")
    images.add_argument(
        "--prediction", choices=("epsilon", "v_prediction"), help="what the diffusion predicts (default: epsilon)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights (default: the checkpoint's)"
    )
    parser.add_argument("--parts", choices=("image", "all"), default="image", help="what to save (default: image)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")


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
    num_tokens = model.tokens_per_image  # raises if codec and patch coder do not fit
    model.save_pretrained(args.output, parts=args.parts)
    num_image, num_text = (sum(p.numel() for p in tower.parameters()) for tower in (model.image, model.text))
    vision = ""
    if model.vision is not None:
        vision = f" and {sum(p.numel() for p in model.vision.parameters()) / 1e6:.1f} M vision"
    print(
        f"{args.output}: {num_text / 1e6:.1f} M frozen text{vision} parameters, {num_image / 1e6:.1f} M image "
        f"parameters to train, {num_tokens} tokens per image"
    )
    return 0


def _given(**options: object) -> dict[str, object]:
    """The options that are given; the others keep the defaults of the configuration classes."""
    return {name: value for name, value in options.items() if value is not None}
