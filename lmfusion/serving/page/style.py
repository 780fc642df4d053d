"""The page's style: colours of gradio's theme in light and dark, and the fonts of the reader's system."""

from typing import Any

CSS = """
.dark { color-scheme: dark; }
.gradio-container { max-width: 1480px !important; width: 100%; margin: 0 auto; padding: 8px 20px !important; }
.gradio-container * { scrollbar-width: thin; }
footer { display: none !important; }

#head { align-items: center; flex-wrap: nowrap; }
#title h1 { font-size: 1.3rem; font-weight: 600; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
#title p { margin: 0; color: var(--body-text-color-subdued); font-size: 0.88rem; }
#title .hint { margin-top: 4px; border-left: 3px solid var(--color-accent); padding-left: 8px; }
#clear, #dark { padding: 6px 12px; }

#chat { height: calc(100dvh - 222px); min-height: 320px; }
#chat .icon-button-wrapper { display: none; }
#chat .prose { opacity: 1; }
#chat img.image, #chat img.preview {
  display: block; margin: 6px 0 2px; border-radius: 6px; max-width: 100%; height: auto;
  box-shadow: 0 0 0 1px var(--border-color-primary);
}
img.pixelated, #gallery.pixelated img { image-rendering: pixelated; }
#chat progress { display: block; width: 192px; max-width: 100%; height: 4px; border: 0; border-radius: 2px; }
#chat progress, #chat progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 2px; }
#chat progress::-webkit-progress-value { background: var(--color-accent); border-radius: 2px; }
#chat progress::-moz-progress-bar { background: var(--color-accent); border-radius: 2px; }
#chat .blank {
  max-width: 100%; margin: 6px 0 2px; border-radius: 6px; background: var(--background-fill-secondary);
  box-shadow: 0 0 0 1px var(--border-color-primary);
}
#chat .note { color: var(--body-text-color-subdued); font-size: 0.85rem; font-style: italic; }
#chat .waiting { color: var(--body-text-color-subdued); animation: breathe 1.6s ease-in-out infinite; }
@keyframes breathe { 50% { opacity: 0.35; } }

#side { max-height: calc(100dvh - 140px); overflow-y: auto; flex-wrap: nowrap; }
#gallery .grid-wrap { height: auto !important; min-height: 80px !important; max-height: 45dvh; }
#gallery .grid-wrap { overflow: hidden auto !important; }
#gallery .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; height: auto !important; }
#gallery .thumbnail-item { height: auto !important; aspect-ratio: 1; }
#gallery .caption-label { display: none; }
#details { padding: 4px; }
#details img { border-radius: 6px; max-width: 100%; height: auto; }
#details table { width: 100%; margin-top: 8px; font-size: 0.88rem; border-collapse: collapse; }
#details th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); padding: 3px 8px 3px 0; }
#details :is(table, tr, th, td) { vertical-align: top; border: 0 !important; }
#details tr { border-bottom: 1px solid var(--border-color-primary) !important; }
#details td { overflow-wrap: anywhere; padding: 3px 0; }

@media (max-width: 760px) {
  #chat { height: 62dvh; }
  #side { max-height: none; }
}
"""

SWITCH_DARK = "() => { document.body.classList.toggle('dark'); }"


def theme() -> Any:
    """gradio's default theme with muted colours and system fonts, so that no font is loaded from elsewhere."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
