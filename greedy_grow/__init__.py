# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line `greedy-grow`. It is a package of its own, since importing `diffusers_greedy_grow` imports torch."""
