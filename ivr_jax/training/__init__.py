"""The three stages of training and what they share.

    loop.py               data -> step -> metrics, logs, checkpoints, resumption: for all stages
    state.py              parameters and optimiser state, sharded; one optimiser step
    optimizer.py          AdamW or Muon, warm-up, decay, clipping
    losses.py             log-probabilities in chunks of the vocabulary; `grpo_loss`
    grad_accum.py         gradients of several micro-batches
    metrics.py            sums between log lines, the log
    throughput.py         tokens a second, MFU, device memory, profiles

    image_tokenizer.py    stage 1
    sft.py                stage 2; training_samples.py: its samples for the report

    grpo.py               stage 3: one step, top to bottom; its docstring gives the reading order
    rl_stage.py           from a config to a trainer; rl_options.py: its options; judge_config.py: its judge
    prompts.py            where prompts come from
    refill.py             new answers in place of those without a judgement
    scoring.py            from judgements to rewards, advantages and metrics
    minibatches.py        which answers learn, and in which minibatch
    answer_batches.py     answers as batches: packed into rows, or one a row
    policy_logprobs.py    log-probabilities, `policy_gradient`
    rl_state.py           what an RL run carries from step to step
    multihost_rl.py       exchange between processes
    monitor.py            alarms
    stored_rollouts.py    a step's answers on disk, for people and for `inspect`
"""
