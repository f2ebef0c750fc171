"""How the page looks, in light and dark: colours of the reports, fonts of the system, nothing from outside."""

from __future__ import annotations

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONOSPACED = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
ACCENT = gr.themes.Color(
    "#eef8f8", "#d5eeee", "#aedddf", "#7cc6c9", "#45a7ab", "#0f868d", "#0a6c74", "#0b575e", "#0d464c", "#0e3b40",
    "#062226",
)  # fmt: skip
GREY = gr.themes.Color(
    "#faf9f6", "#f3f2ee", "#e3e0d9", "#cfcbc2", "#a4abb6", "#7b838f", "#59606b", "#30343c", "#23272e", "#1c1f25",
    "#14161a",
)  # fmt: skip

CSS = """
.gradio-container main.fillable{width:100%;max-width:1240px!important;margin:0 auto;padding:20px 16px}
#head .html-container{padding:0}
#head h1{font-size:1.5rem;font-weight:650;letter-spacing:-.01em;margin:0}
#head p{color:var(--body-text-color-subdued);margin:0}
#picture{height:360px}
.chat{height:calc(100vh - 270px)!important;min-height:340px}
.several .chat{height:calc(100vh - 376px)!important}
.chat .bot.message{display:flex;flex-wrap:wrap;column-gap:12px}
.chat .bot.message>:first-child{flex:0 0 100%}
.chat .bot.message>:not(:first-child){width:auto}
.chat .user .image-frame img{width:auto;max-height:160px}
.chat .bot .image-frame img{width:100%;max-width:264px;max-height:264px}
.chat .message-content .chatbot{white-space:pre-wrap}
.chat [aria-label="Share"]{display:none}
#question .submit-button,#question .stop-button{background:var(--button-primary-background-fill);color:#fff}
#foot{align-items:center;justify-content:space-between;flex-wrap:nowrap}
#traced{border:0;background:none;padding:0}
#fresh{flex:0 0 auto}
@media (max-width:640px){
  #picture{height:220px}
  .chat,.several .chat{height:auto!important;min-height:260px}
  .chat .bubble-wrap{max-height:68vh}
  .chat .placeholder-content{min-height:220px}
}
"""


def theme() -> gr.themes.Base:
    """Gradio's plainest theme in the colours of eyespot's reports."""
    return gr.themes.Base(
        primary_hue=ACCENT, secondary_hue=ACCENT, neutral_hue=GREY, font=FONTS, font_mono=MONOSPACED, radius_size="lg"
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_subdued="*neutral_600",
        background_fill_primary_dark="*neutral_900",
        block_background_fill_dark="*neutral_900",
        input_background_fill="white",
        input_background_fill_dark="*neutral_800",
        input_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )
