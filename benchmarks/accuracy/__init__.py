"""One command per question about accuracy: trains what is missing, measures, writes JSON, prints the table.

python -m benchmarks.accuracy QUESTION --data DIR [--config FILE] [--set KEY=VALUE ...] [--seeds 0,1]
"""
