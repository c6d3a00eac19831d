# This file is part of meas_vaedeblend.
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Overrides for VaeDeblendTask on a machine with an NVIDIA GPU and onnxruntime-gpu:
#   pipetask run ... -C vaeDeblend:config/gpu.py
# No GPU has been measured yet.
# ruff: noqa: F821

config.executionProviders = ["CUDAExecutionProvider", "CPUExecutionProvider"]
# A GPU job that quietly runs on one core of its node is worse than one that fails at once.
config.requireProvider = True
