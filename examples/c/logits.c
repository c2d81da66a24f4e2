/* Print the logits of one image with a vit-edge model file and OpenVINO's C API; README.md shows how to build it. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <openvino/c/openvino.h>

static void check(ov_status_e status, const char *what) {
    if (status == OK) return;
    fprintf(stderr, "error: cannot %s: %s\n", what, ov_get_last_err_msg());
    exit(7);
}

/* Return the bytes of a file that must have exactly this many. */
static uint8_t *read_pixels(const char *path, size_t size) {
    FILE *file = fopen(path, "rb");
    uint8_t *pixels = malloc(size);
    if (!file || !pixels || fread(pixels, 1, size, file) != size || fgetc(file) != EOF) {
        fprintf(stderr, "error: cannot use %s: %zu bytes are needed\n", path, size);
        exit(3);
    }
    fclose(file);
    return pixels;
}

int main(int count, char **arguments) {
    if (count != 5) {
        fprintf(stderr, "usage: %s MODEL IMAGE.rgb HEIGHT WIDTH\n", arguments[0]);
        return 2;
    }
    const int64_t height = atoll(arguments[3]), width = atoll(arguments[4]);
    const int64_t sizes[] = {1, height, width, 3};
    uint8_t *pixels = read_pixels(arguments[2], (size_t)(height * width * 3));
    ov_core_t *core;
    ov_model_t *model;
    ov_compiled_model_t *compiled;
    ov_infer_request_t *request;
    ov_tensor_t *input, *logits;
    ov_shape_t shape;
    size_t classes;
    void *data;
    check(ov_core_create(&core), "start OpenVINO");
    check(ov_core_read_model(core, arguments[1], NULL, &model), "read the model");
    check(ov_core_compile_model(core, model, "CPU", 2, &compiled, ov_property_key_hint_inference_precision, "f32"),
          "compile the model");
    check(ov_compiled_model_create_infer_request(compiled, &request), "make a request");
    check(ov_shape_create(4, sizes, &shape), "make a shape");
    check(ov_tensor_create_from_host_ptr(U8, shape, pixels, &input), "make the input");
    check(ov_infer_request_set_input_tensor(request, input), "set the input");
    check(ov_infer_request_infer(request), "run the model");
    check(ov_infer_request_get_tensor(request, "logits", &logits), "read the logits");
    check(ov_tensor_get_size(logits, &classes), "read the logits");
    check(ov_tensor_data(logits, &data), "read the logits");
    for (size_t i = 0; i < classes; i++) printf("%.9g\n", ((float *)data)[i]);
    return 0;
}
