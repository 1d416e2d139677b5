// One pass over a target of random weights in every format, and a draw and a verification; prints the bits of what comes
// out. For processors that run under an emulator, where there is no Python to call the library.

#include <cstdio>
#include <vector>

#include "pass.cpp"

namespace {

uint32_t state = 1;

uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
float random_float() { return float(random_bits() % 2001) / 1000.0f - 1.0f; }

template <class T>
std::vector<T>* kept(size_t count) {  // never given back
  return new std::vector<T>(count);
}

float* random_floats(size_t count) {
  auto& values = *kept<float>(count);
  for (float& value : values) value = random_float();
  return values.data();
}

bf16* random_bf16(size_t count) {
  auto& values = *kept<bf16>(count + WIDTH);
  for (size_t i = 0; i < count; i += WIDTH) store_bf16(&values[i], load(random_floats(WIDTH)));
  return values.data();
}

Packed random_weight(int n, int k, Format format, bool has_minimums = false) {
  n = (n + BLOCK - 1) / BLOCK * BLOCK;
  Packed weight{nullptr, n, k, BLOCK_TILES, format, nullptr, nullptr};
  if (format == BFLOAT16) {
    weight.data = random_bf16(size_t(n) * k);
    return weight;
  }
  auto& bytes = *kept<uint8_t>(size_t(n) * k);
  for (uint8_t& byte : bytes) byte = uint8_t(random_bits());
  weight.data = bytes.data();
  for (const uint16_t** place : {&weight.scales, &weight.minimums}) {
    if (place == &weight.minimums && !has_minimums) continue;
    auto& halves = *kept<uint16_t>(size_t(n) * k / GROUP);
    for (uint16_t& half : halves) {
      half = uint16_t(0x1400 + random_bits() % 0x400);
      if (random_bits() % 2) half |= 0x8000;
    }
    *place = halves.data();
  }
  return weight;
}

void print(const char* name, const float* values, size_t count) {
  std::printf("%s", name);
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    std::printf(" %08x", bits);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  constexpr int COUNT = 9, HIDDEN = 64, HEADS = 4, KEY_HEADS = 2, SIZE = 32, INNER = 96, VOCABULARY = 100, SLOTS = 40;
  std::fprintf(stderr, "%s\n", eda_isa());
  const Format formats[] = {BFLOAT16, INT8, INT4, INT4};
  for (int kind = 0; kind < 4; ++kind) {
    const auto weight = [&](int n, int k) { return random_weight(n, k, formats[kind], kind == 3); };
    std::vector<Layer> layers;
    for (int i = 0; i < 2; ++i)
      layers.push_back({weight((HEADS + 2 * KEY_HEADS) * SIZE, HIDDEN), weight(HIDDEN, HEADS * SIZE),
                        weight(2 * INNER, HIDDEN), weight(HIDDEN, INNER), random_floats(HIDDEN), random_floats(HIDDEN),
                        random_floats(256), random_floats(64), random_floats(SIZE), random_floats(SIZE)});
    const Packed head = weight(VOCABULARY, HIDDEN);
    const Shape shape{HIDDEN, HEADS, KEY_HEADS, SIZE, HIDDEN, INNER, 1e-5f, 0.2f};
    std::vector<Visible> visible;
    std::vector<int64_t> slots;
    std::vector<int32_t> wanted;
    for (int i = 0; i < COUNT; ++i) {
      visible.push_back({3, 20 + i, 0, nullptr});
      slots.push_back(22 + i);
      wanted.push_back(i);
    }
    const Segment segment{0, COUNT, nullptr, nullptr, nullptr};
    const size_t cache = size_t(2) * KEY_HEADS * SLOTS * SIZE;
    const Tokens tokens{COUNT, 1, &segment, random_floats(COUNT * SIZE), random_floats(COUNT * SIZE), slots.data(),
                        visible.data(), random_bf16(cache), random_bf16(cache), SLOTS};
    std::vector<bf16> hidden(COUNT * HIDDEN), features(3 * COUNT * HIDDEN);
    std::vector<float> logits(COUNT * VOCABULARY);
    std::vector<int64_t> best(COUNT);
    const int32_t taps[] = {0, 1, 1};
    const float* norm = random_floats(HIDDEN);  // not among the arguments, whose order each compiler chooses
    const bf16* embedded = random_bf16(COUNT * HIDDEN);
    eda_run_target(2, &shape, layers.data(), 2, norm, &head, &tokens, embedded, hidden.data(), features.data(), taps, wanted.data(), COUNT, VOCABULARY, logits.data(), best.data());
    print("logits", logits.data(), logits.size());
    for (int64_t token : best) std::printf(" %d", int(token));
    std::vector<float> weights(VOCABULARY + WIDTH);
    const Sampling sampling{0.9, 0.8f, 0.01f, 50, 0};
    const double total = weigh(logits.data(), VOCABULARY, sampling, weights.data());
    print("\nweights", weights.data(), VOCABULARY);
    std::printf("%a %d\n", total, draw_by(weights.data(), VOCABULARY, total, 0.7));
  }
}
