"""What tests share: ranks as processes and as threads, models, comparisons."""
