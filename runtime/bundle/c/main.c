/* Classify with the model of this folder through OpenVINO's C API.
 *
 *     classify model.xml               run the golden inputs, print their logits, compare them with those of model.h
 *     classify model.xml image.rgb     print the labels of one image: uint8 RGB, row by row, of the network's size
 *
 * Exit codes are those of vit-edge: 0 done, 2 usage, 3 a file cannot be used, 6 other logits, 7 OpenVINO failed.
 */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openvino/c/openvino.h>

#include "model.h"

#define IMAGE_BYTES (MODEL_HEIGHT * MODEL_WIDTH * 3)
#define TOP 5

/* A fixed batch is filled up with zeros. */
static uint8_t input[MODEL_BATCH * IMAGE_BYTES];
static float logits[MODEL_CLASSES];
static ov_infer_request_t *request;

static void check(ov_status_e status, const char *what) {
    if (status == OK) return;
    fprintf(stderr, "error: cannot %s: %s\n", what, ov_get_last_err_msg());
    exit(7);
}

/* Load the model for the CPU, its float part in float32. */
static void load(const char *path) {
    ov_core_t *core;
    ov_model_t *model;
    ov_compiled_model_t *compiled;
    ov_tensor_t *tensor;
    ov_shape_t shape;
    const int64_t sizes[] = {MODEL_BATCH, MODEL_HEIGHT, MODEL_WIDTH, 3};
    check(ov_core_create(&core), "start OpenVINO");
    check(ov_core_read_model(core, path, NULL, &model), "read the model");
    check(ov_core_compile_model(core, model, "CPU", 2, &compiled, ov_property_key_hint_inference_precision, "f32"),
          "compile the model");
    check(ov_compiled_model_create_infer_request(compiled, &request), "make a request");
    check(ov_shape_create(4, sizes, &shape), "make a shape");
    check(ov_tensor_create_from_host_ptr(U8, shape, input, &tensor), "make the input");
    check(ov_infer_request_set_input_tensor(request, tensor), "set the input");
}

/* Compute `logits` of the image in `input`. */
static void run(void) {
    ov_tensor_t *tensor;
    void *data;
    check(ov_infer_request_infer(request), "run the model");
    check(ov_infer_request_get_tensor(request, "logits", &tensor), "read the logits");
    check(ov_tensor_data(tensor, &data), "read the logits");
    memcpy(logits, data, sizeof logits);
    ov_tensor_free(tensor);
}

/* The top byte of each output of SplitMix64 seeded with `stream` x 2^32. */
static void random_bytes(uint64_t stream, uint8_t *bytes, int count) {
    uint64_t state = stream << 32;
    for (int i = 0; i < count; i++) {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        bytes[i] = (uint8_t)((z ^ (z >> 31)) >> 56);
    }
}

/* Fill `input` with the golden input of a seed: colored tiles under fine noise. */
static void make_golden_input(uint32_t seed) {
    static uint8_t colors[8 * 8 * 3];
    const int tiles = 2 + seed % 7;
    random_bytes(2 * (uint64_t)seed, colors, tiles * tiles * 3);
    random_bytes(2 * (uint64_t)seed + 1, input, IMAGE_BYTES);
    for (int i = 0; i < IMAGE_BYTES; i++) {
        const int channel = i % 3, x = i / 3 % MODEL_WIDTH, y = i / 3 / MODEL_WIDTH;
        const int tile = y * tiles / MODEL_HEIGHT * tiles + x * tiles / MODEL_WIDTH;
        input[i] = (uint8_t)((3 * colors[tile * 3 + channel] + input[i]) / 4);
    }
}

/* How far a logit may be off: the smallest of the bounds that model.h has; a bound that it lacks is negative. */
static double allowed(const float *expected, double value) {
    double low = INFINITY, high = -INFINITY, most = INFINITY;
    for (int i = 0; i < MODEL_CLASSES; i++) {
        low = fmin(low, expected[i]);
        high = fmax(high, expected[i]);
    }
    if (MODEL_TOLERANCE_SPREAD >= 0) most = MODEL_TOLERANCE_SPREAD * fmax(high - low, MODEL_TOLERANCE_LEAST_SPREAD);
    if (MODEL_TOLERANCE_ABSOLUTE < 0 && MODEL_TOLERANCE_RELATIVE < 0) return most;
    return fmin(most, fmax(MODEL_TOLERANCE_ABSOLUTE, 0) + fmax(MODEL_TOLERANCE_RELATIVE, 0) * fabs(value));
}

static int largest(const float *values, int than) {
    int found = -1;
    for (int i = 0; i < MODEL_CLASSES; i++)
        if (i != than && (found < 0 || values[i] > values[found])) found = i;
    return found;
}

static int is_clear(const float *expected) {
    const int first = largest(expected, -1), second = largest(expected, first);
    return MODEL_TOLERANCE_TOP1_GAP >= 0 && (second < 0 || expected[first] - expected[second] > MODEL_TOLERANCE_TOP1_GAP);
}

/* Print the logits of every golden input, one line each; returns the exit code. */
static int check_golden(void) {
    double signal = 0, noise = 0, excess = 0;
    int changed = 0;
    for (int image = 0; image < MODEL_GOLDEN_INPUTS; image++) {
        const float *expected = MODEL_GOLDEN_LOGITS + image * MODEL_CLASSES;
        make_golden_input(MODEL_GOLDEN_SEEDS[image]);
        run();
        for (int i = 0; i < MODEL_CLASSES; i++) {
            const double off = fabs((double)logits[i] - expected[i]);
            signal += (double)expected[i] * expected[i];
            noise += off * off;
            if (!(off - allowed(expected, expected[i]) <= excess)) excess = off - allowed(expected, expected[i]);
            printf("%.9g%c", logits[i], i + 1 < MODEL_CLASSES ? ' ' : '\n');
        }
        changed += is_clear(expected) && largest(logits, -1) != largest(expected, -1);
    }
    const double level = noise > 0 ? 10 * log10(signal / noise) : INFINITY;
    fprintf(stderr, "%d golden inputs, SQNR %.1f dB\n", MODEL_GOLDEN_INPUTS, level);
    if (excess <= 0 && level >= MODEL_TOLERANCE_SQNR_DB && !changed) return 0;
    fprintf(stderr, "error: the model gives other logits here: a logit is %.3g beyond its bound, SQNR %.1f dB, %d clear "
                    "predictions changed\ntry: do not use the model here\n", fmax(excess, 0), level, changed);
    return 6;
}

/* Print the likeliest labels of an image and their logits; returns the exit code. */
static int classify(const char *path) {
    FILE *file = fopen(path, "rb");
    const size_t count = file ? fread(input, 1, IMAGE_BYTES, file) : 0;
    if (count != IMAGE_BYTES || fgetc(file) != EOF) {
        fprintf(stderr, "error: cannot use %s: the network takes %d x %d pixels of 3 bytes\ntry: make them with vit-edge, "
                        "as README.md shows\n", path, MODEL_WIDTH, MODEL_HEIGHT);
        return 3;
    }
    fclose(file);
    run();
    for (int i = 0; i < TOP && i < MODEL_CLASSES; i++) {
        const int best = largest(logits, -1);
        printf("%s %.9g\n", MODEL_LABELS[best], logits[best]);
        logits[best] = -INFINITY;
    }
    return 0;
}

int main(int count, char **arguments) {
    if (count != 2 && count != 3) {
        fprintf(stderr, "usage: %s model.xml [image.rgb]\n", arguments[0]);
        return 2;
    }
    load(arguments[1]);
    return count == 3 ? classify(arguments[2]) : check_golden();
}
