"""What runs and trained models have to say: numbers, tables and pictures.

statistics     variants on the same seeds: intervals, paired differences, corrected p-values
report         a comparison as tables and plots
views          what a trained model sees in single images and captions
probing        trained models on a split that is disturbed, cut, or looked at part by part
probe_report   what probing found, as tables and plots
pictures       images and captions as a model sees them, ranks of two models
colours        of all plots and pictures
"""
