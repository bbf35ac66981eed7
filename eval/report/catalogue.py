"""The catalogue of metrics, by group: key -> (title, unit, what is better, definition).

Units: share (printed in per cent), score, nats, steps, seconds. Better: "as retrained", "high",
"low", "50 %" or "1". `definitions` reads it.
"""

from __future__ import annotations

from letheon.eval.report import terminal

_OF_TABLE = terminal.definitions()
_READING = " Our reading: the published formula could not be read; unverified."

CATALOGUE: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "Distance to the retrained models": {
        "gap": ("Accuracy gap", "share", "low", _OF_TABLE["gap"]),
        "average_gap": (
            "Average gap",
            "share",
            "low",
            "Mean of |model - retrained| over UA, RA, TA (here TRA) and MIA (here SVC-efficacy "
            "on confidence), in percentage points (Fan et al. 2024).",
        ),
        "tow": (
            "ToW",
            "score",
            "high",
            "Tug of war: (1 - |dFA|)(1 - |dRA|)(1 - |dTA|), differences to the retrained model; "
            "between 0 and 1 (Zhao et al. 2024).",
        ),
        "tow_mia": (
            "ToW-MIA",
            "score",
            "high",
            "ToW with the gap of the membership attack in place of the forget accuracy's (Zhao "
            "et al. 2024).",
        ),
        "aus": (
            "AUS",
            "score",
            "high",
            "Adaptive unlearning score: (1 - (TRA of the original - TRA)) / (1 + TFA) (Cotogni "
            "et al. 2023).",
        ),
        "h_mean": (
            "H-Mean",
            "score",
            "high",
            "Harmonic mean of the drop of TFA from the original model and of TRA." + _READING,
        ),
        "agl": (
            "AGL",
            "score",
            "high",
            "Logit side: product of 1 - |gap to retrained| over FA, RA, TFA, TRA." + _READING,
        ),
        "agr": (
            "AGR",
            "score",
            "high",
            "Representation side: (1 - |CKA gap|)(1 - |k-NN gap|)." + _READING,
        ),
        "h_lr": ("H-LR", "score", "high", "Harmonic mean of AGL and AGR." + _READING),
    },
    "Accuracy": {
        "FA": ("FA", "share", "as retrained", _OF_TABLE["FA"]),
        "RA": ("RA", "share", "as retrained", _OF_TABLE["RA"]),
        "TFA": ("TFA", "share", "as retrained", _OF_TABLE["TFA"]),
        "TRA": ("TRA", "share", "as retrained", _OF_TABLE["TRA"]),
        "UA": ("UA", "share", "as retrained", _OF_TABLE["UA"]),
    },
    "Membership inference": {
        "svc_efficacy_confidence": (
            "SVC-efficacy (confidence)",
            "share",
            "as retrained",
            "Share of the forget set that a support vector classifier (RBF, C = 3), trained with "
            "retain images as members and test images as non-members on the probability of the "
            "true class, calls non-members. What papers call MIA. For whole classes about 100 % "
            "whatever was forgotten (Jia et al. 2023).",
        ),
        "svc_efficacy_entropy": (
            "SVC-efficacy (entropy)",
            "share",
            "as retrained",
            "The same attack on the entropy of the prediction (Jia et al. 2023).",
        ),
        "svc_efficacy_correctness": (
            "SVC-efficacy (correctness)",
            "share",
            "as retrained",
            "The same attack on whether the prediction is right (Jia et al. 2023).",
        ),
        "svc_efficacy_modified_entropy": (
            "SVC-efficacy (mod. entropy)",
            "share",
            "as retrained",
            "The same attack on -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i) (Song "
            "and Mittal 2021), by definition; released code computes something else.",
        ),
        "svc_efficacy_probabilities": (
            "SVC-efficacy (probabilities)",
            "share",
            "as retrained",
            "The same attack on the whole vector of probabilities (Jia et al. 2023).",
        ),
        "lr_entropy": (
            "LR-entropy",
            "share",
            "as retrained",
            "Share of the forget set that a balanced logistic regression on entropy, trained on "
            "retain against test images, calls members; note the opposite direction to SVC- "
            "efficacy (Chundawat et al. 2023).",
        ),
        "loss_two_sample": (
            "Loss two-sample",
            "share",
            "50 %",
            "Cross-validated accuracy of a logistic regression that tells forget images from "
            "held-out images of the same classes by their loss (Kurmanji et al. 2023).",
        ),
        "mia_auc": (
            "AUC, class-matched",
            "share",
            "50 %",
            "Area under the ROC curve of the true-class margin, forget images against held-out "
            "images of the same classes; ties count half.",
        ),
        "mia_within_class_auc": (
            "AUC within classes",
            "share",
            "50 %",
            "Mean over the forgotten classes of the AUC within the class, weighted by its images.",
        ),
        "mia_tpr_1pct": (
            "TPR at 1 % FPR",
            "share",
            "low",
            "Largest share of forget images found with at most 1 % of the held-out images of the "
            "same classes called members; no interpolation (Carlini et al. 2022).",
        ),
        "mia_tpr_01pct": (
            "TPR at 0.1 % FPR",
            "share",
            "low",
            "The same at 0.1 %; with fewer than 1,000 held-out images this is at no false "
            "positive.",
        ),
        "rmia_auc": (
            "RMIA AUC",
            "share",
            "50 %",
            "AUC of the RMIA score, the share of population images z for which the likelihood "
            "ratio of x to z reaches gamma, with 1 to 4 reference models (Zarifzadeh et al. "
            "2024).",
        ),
        "rmia_tpr_1pct": (
            "RMIA TPR at 1 % FPR",
            "share",
            "low",
            "Largest true-positive rate of the RMIA score at no more than 1 % false positives.",
        ),
        "u_lira": (
            "U-LiRA",
            "share",
            "50 %",
            "Balanced accuracy of the per-image likelihood-ratio test between models that "
            "unlearned an image and models that never saw it (Hayes et al. 2024).",
        ),
        "klom_mean": (
            "KLOM, mean",
            "nats",
            "low",
            "Mean over forget images of the divergence between the margins of unlearned and of "
            "retrained models, 20 bins (Rinberg et al. 2025).",
        ),
        "klom_p95": (
            "KLOM, 95th percentile",
            "nats",
            "low",
            "The 95th percentile over forget images of the same divergence (Rinberg et al. 2025).",
        ),
        "challenge_quality": (
            "Challenge quality F",
            "score",
            "high",
            "NeurIPS 2023 challenge: mean over forget images of 2^-floor(epsilon / 0.5), epsilon "
            "the largest that an attack on many unlearned and retrained models shows.",
        ),
        "challenge_score": (
            "Challenge score",
            "score",
            "high",
            "F times RA and TRA (means over the runs), each over the retrained models'.",
        ),
    },
    "Representation and probes": {
        "knn": ("k-NN", "share", "as retrained", _OF_TABLE["knn"]),
        "cka_original": ("CKA to original", "score", "as retrained", _OF_TABLE["cka_original"]),
        "cka_retrained": ("CKA to retrained", "score", "high", _OF_TABLE["cka_retrained"]),
        "probe_forgotten": (
            "Probe: forgotten",
            "share",
            "as retrained",
            "Held-out accuracy on the forgotten classes of a linear classifier trained on the "
            "frozen features of all classes.",
        ),
        "probe_retained": (
            "Probe: retained",
            "share",
            "as retrained",
            "The same classifier's held-out accuracy on the other classes.",
        ),
        "probe_few_shot": (
            "Few-shot probe",
            "share",
            "as retrained",
            "Held-out accuracy on the forgotten classes with a few training images a class.",
        ),
        "idi": (
            "IDI",
            "score",
            "low",
            "Information Difference Index: what the layers tell about 'is it forgotten' beyond "
            "the retrained model, over the same of the original; 0 ideal, 1 as if nothing was "
            "done (Jeon et al. 2026). InfoNCE on held-out samples, with a linear critic (ours) or, "
            "by --critic layers, one built of the later layers, as the paper has it.",
        ),
        "relearn_steps": (
            "Relearn time",
            "steps",
            "as retrained",
            "Steps of one fixed recipe, the whole network on as many retain as forget images, "
            "until held-out accuracy on the forgotten classes is within 5 points of the "
            "original's; only multiples of the measuring interval can come out.",
        ),
        "relearn_steps_head": (
            "Relearn time, head",
            "steps",
            "as retrained",
            "The same where only the last linear layer learns, on frozen features.",
        ),
        "anamnesis_index": (
            "Anamnesis index",
            "score",
            "1",
            "Relearn steps over the retrained model's; 1 is ideal (Chundawat et al. 2023).",
        ),
    },
    "Weights": {
        "weight_distance_original": (
            "Weights to original",
            "score",
            "",
            "Euclidean distance of all parameters to the original model's, over their norm: how "
            "far a method moved.",
        ),
        "weight_distance_retrained": (
            "Weights to retrained",
            "score",
            "",
            "The same to the retrained models, mean. Networks from other initialisations are far "
            "apart even where they compute the same.",
        ),
    },
    "Output distributions": {
        "js": (
            "JS divergence",
            "nats",
            "low",
            "Jensen-Shannon divergence to the retrained model's predictions on the forget set, "
            "natural logarithm, mean over images; at most log 2 = 0.693; of several retrained "
            "models the mean.",
        ),
        "activation_distance": (
            "Activation distance",
            "score",
            "low",
            "Mean Euclidean distance of the softmax vectors to the retrained model's on the "
            "forget set (Golatkar et al. 2021).",
        ),
        "zrf": (
            "ZRF",
            "score",
            "as retrained",
            "1 - JS divergence to an untrained network's predictions on the forget set, in nats "
            "(Chundawat et al. 2023).",
        ),
        "completeness": (
            "Completeness",
            "share",
            "high",
            "Share of held-out images for which the model and the retrained model name the same "
            "class.",
        ),
    },
    "Cost": {
        "seconds": ("Run time", "seconds", "low", _OF_TABLE["seconds"]),
    },
}
