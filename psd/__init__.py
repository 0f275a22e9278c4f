"""Text-to-3D by score distillation, and by Preference Score Distillation (PSD, arXiv 2603.01594) above all."""
