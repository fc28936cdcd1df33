"""Experiments with BioHama and its controls: training, evaluation, reports. Needs the extra `experiments`.

python -m biohama.experiments task=copy model=biohama seed=0 out=runs/x     one run, or with -m many
python -m biohama.experiments.suite tasks=[copy,sort] models=[biohama,lstm] seeds=[0,1,2] out=runs/grid jobs=2
python -m biohama.experiments.report runs/grid --out runs/report             tables and pictures
python -m biohama.experiments.continual out=runs/continual                   tasks learnt one after another
python -m biohama.experiments.quick                                          every part in a minute
"""
