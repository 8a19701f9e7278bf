"""The study of fixed-point networks: training, layers of ResNet-50 and figures. Run by study.py."""
