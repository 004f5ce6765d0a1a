"""What BLPO is compared with: files for RL Zoo's `--conf-file`."""
