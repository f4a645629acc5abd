"""One command per question about accuracy: trains what is missing, measures, writes JSON, prints the table.

python -m benchmarks.accuracy QUESTION --data DIR [--config FILE] [--set KEY=VALUE ...] [--seeds 0,1]

stages, encoder, ids, codes, longer   whole runs, compared (`whole_runs.py`)
views                                 one network of several trees against what it must beat (`compare_views.py`)
walk                                  steps that walk the item graph, and what they must beat (`compare_walk.py`)
back                                  steps that read the user's older history, and what they must beat
                                      (`compare_back.py`)
interleaved                           steps between an item's tokens, and what they must beat
                                      (`compare_interleaved.py`)
newest                                what is gained by learning from the newest events before serving
                                      (`compare_newest.py`)
all others                            one thing changed at a time, on checkpoints that share ancestors
"""
