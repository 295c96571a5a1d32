"""auto_trans_ckpt: a job's checkpoint, made into what each of its ranks needs before the job loads it."""
