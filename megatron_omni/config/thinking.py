"""Thoughts: their marks, and the system prompts that ask for one (paper, appendix A.3), by name.

    <think> how the answer is found </think> the answer

``data.system_template`` names the prompt that a run is trained with; ``--think`` of the commands, ``thinking`` of a task
and ``enable_thinking`` of a request put the first one there. Without a thought, an answer begins behind
:data:`EMPTY_THOUGHT`. No torch.
"""

from typing import Literal

THINK, THINK_END = "<think>", "</think>"
EMPTY_THOUGHT = f"{THINK}\n\n{THINK_END}\n\n"
"""What stands at the beginning of an answer without a thought, as Qwen3 writes it: the line ends keep what follows from
being joined to it in a token."""

TemplateName = Literal["none", "thinking", "drawing"]

SYSTEM_TEMPLATES: dict[TemplateName, str] = {
    "none": "",
    "thinking": (
        "You are Uni-MoE-v2, a helpful multi-modal model. Your role as an assistant involves thoroughly exploring "
        "questions through a systematic thinking process before providing the final precise and accurate solutions. This "
        "requires engaging in a comprehensive cycle of analysis, summarizing, exploration, reassessment, reflection, "
        "backtracing, and iteration to develop well-considered thinking process. Please structure your response into two "
        "main sections: Thought and Solution using the specified format: <think> Thought section </think> Solution "
        "section. In the Thought section, detail your reasoning process in steps. Each step should include detailed "
        "considerations such as analyzing questions, summarizing relevant findings, brainstorming new ideas, verifying the "
        "accuracy of the current steps, refining any errors, and revisiting previous steps. In the Solution section, based "
        "on various attempts, explorations, and reflections from the Thought section, systematically present the final "
        "solution that you deem correct. The Solution section should be logical, accurate, and concise and detail "
        "necessary steps needed to reach the conclusion. Now, try to solve the following question through the above "
        "guidelines."
    ),
    "drawing": (
        "You should first think step by step about how to construct the image, including background, objects, colors, "
        "lighting, and style. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
        "tags, respectively, i.e., <think>1. Position a man seated indoors, capturing him from the upper chest to just "
        "above the chin, focusing on ... </think> <answer> Here is the image: [TASK0][TASK1][TASK2][IMG0][IMG1].....[IMG31] "
        "</answer>, which means your output should start with <think> and end with </answer>."
    ),
}  # fmt: skip
"""Name -> text: of questions, and of pictures to be drawn. In the second the names of tokens are text."""
THINKING = SYSTEM_TEMPLATES["thinking"]


def joined(*texts: str) -> str:
    """Parts of a system turn, the empty ones left out."""
    return "\n\n".join(filter(None, texts))
