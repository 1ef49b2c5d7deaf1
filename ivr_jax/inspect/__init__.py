"""Looks inside: a stored sample, a token example, an answer or a rollout, token by token (`python -m ivr_jax.inspect`).

    tokens     what is shown: tokens with their segments and figures, images decoded from their codes
    sources    datasets, token examples and answer folders, and the filters over them
    rollouts   a group of answers sampled now, with log-probability, entropy, reward and advantage
    render     terminal and HTML
"""
