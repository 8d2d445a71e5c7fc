# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
`greedy-grow app` and `greedy-grow space`: a model in a browser. `studio.py` draws, `page.py` is what one sees, `space.py` writes a
Space. Only `page.py` needs gradio.
"""

from .serving import serve
