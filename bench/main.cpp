// effinfer-bench: ops x shapes x dtypes x threads x instruction sets, each beside its floor.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "base/kernels.h"
#include "base/parallel.h"
#include "base/thread_pool.h"
#include "bench.h"
#include "ceilings/ceilings.h"
#include "timing.h"

namespace effinfer::bench {
namespace {

constexpr const char* kUsage = R"(usage: effinfer-bench [options]
  --op NAME        only this op (may be given again)
  --shape TEXT     only shapes that contain TEXT
  --dtype NAME     only f32, bf16 or f16
  --threads LIST   thread counts, such as 1,2 (default: 1 and all cores)
  --isa LIST       instruction sets, such as avx2,scalar (default: the best here)
  --ceilings       only this machine's ceilings
  --seconds S      time spent on each case (default 0.3)
  --json           JSON instead of a table
  --list           ops, their kernels and their shapes
)";

// A case that moves less than this is timed with its data in cache, and held to the cache's speed.
constexpr double kCacheBytes = 16e6;

struct Options {
  std::vector<std::string> ops, isas;
  std::string shape, dtype;
  std::vector<int> threads;
  double seconds = 0.3;
  bool ceilings = false, json = false, list = false;
};

struct Row {
  std::string op, isa;
  const Case* work;
  int threads;
  double seconds, floor_seconds;
  const char* bound;
};

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "effinfer-bench: %s\n%s", message.c_str(), kUsage);
  std::exit(2);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) fail(flag + " needs a value");
      return argv[++i];
    };
    if (flag == "--op") {
      o.ops.push_back(value());
    } else if (flag == "--shape") {
      o.shape = value();
    } else if (flag == "--dtype") {
      o.dtype = value();
    } else if (flag == "--isa") {
      o.isas = split(value());
    } else if (flag == "--threads") {
      for (const auto& n : split(value())) {
        char* end = nullptr;
        const long threads = std::strtol(n.c_str(), &end, 10);
        if (n.empty() || *end != '\0' || threads < 1 || threads > 1024)
          fail("--threads must be whole numbers from 1 to 1024, got '" + n + "'");
        o.threads.push_back(static_cast<int>(threads));
      }
    } else if (flag == "--seconds") {
      const std::string text = value();
      char* end = nullptr;
      o.seconds = std::strtod(text.c_str(), &end);
      if (*end != '\0' || !(o.seconds > 0)) fail("--seconds must be above 0, got '" + text + "'");
    } else if (flag == "--ceilings") {
      o.ceilings = true;
    } else if (flag == "--json") {
      o.json = true;
    } else if (flag == "--list") {
      o.list = true;
    } else if (flag == "--help" || flag == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (flag == "--version") {
      std::puts("effinfer-bench " EFFINFER_VERSION);
      std::exit(0);
    } else {
      fail("unknown option " + flag);
    }
  }
  const int cores = std::max(1u, std::thread::hardware_concurrency());
  if (o.threads.empty()) o.threads = cores > 1 ? std::vector<int>{1, cores} : std::vector<int>{1};
  if (o.isas.empty()) o.isas = {isa_name()};
  for (const auto& name : o.ops)
    if (std::none_of(registered().begin(), registered().end(),
                     [&](const Op& op) { return name == op.name; }))
      fail("unknown op " + name + " (--list shows them)");
  for (const auto& isa : o.isas)
    if (!set_isa_cap(isa.c_str()) || isa != isa_name()) fail("no " + isa + " on this machine");
  return o;
}

const char* name_of(DType t) { return t == DType::f32 ? "f32" : t == DType::bf16 ? "bf16" : "f16"; }

double peak(const Ceilings& c, Peak kind) {
  return 1e9 * (kind == Peak::int8 ? c.dot_gops : kind == Peak::code ? c.code_gops : c.fma_gflops);
}

bool wanted(const Options& o, const Case& c) {
  return c.shape.find(o.shape) != std::string::npos &&
         (o.dtype.empty() || o.dtype == name_of(c.dtype));
}

bool wanted(const Options& o, const Op& op) {
  return o.ops.empty() || std::find(o.ops.begin(), o.ops.end(), op.name) != o.ops.end();
}

void print_ceilings(const std::string& isa, const Ceilings& c, bool json, bool last) {
  if (json) {
    std::printf("    {\"isa\": \"%s\", \"threads\": %d, \"read_gbs\": {", isa.c_str(), c.threads);
    for (int i = 0; i < 4; ++i)
      std::printf("%s\"%d\": %.2f", i ? ", " : "", kStreamCounts[i], c.read_gbs[i]);
    std::printf(
        "}, \"cache_gbs\": %.1f, \"fma_gflops\": %.1f, \"int8_dot_gops\": %.1f, "
        "\"code_dot_gops\": %.1f}%s\n",
        c.cache_gbs, c.fma_gflops, c.dot_gops, c.code_gops, last ? "" : ",");
    return;
  }
  std::printf("%-8s %2d thread%s  read", isa.c_str(), c.threads, c.threads > 1 ? "s" : " ");
  for (int i = 0; i < 4; ++i) std::printf("  %d: %5.1f", kStreamCounts[i], c.read_gbs[i]);
  std::printf(
      " GB/s (by streams)   cache %6.1f GB/s   f32 FMA %6.1f GFLOP/s   int8 dot %6.1f, "
      "codes of 4 bits %6.1f GOP/s\n",
      c.cache_gbs, c.fma_gflops, c.dot_gops, c.code_gops);
}

void print_row(const Row& r, bool json, bool first) {
  const double ms = r.seconds * 1e3, gflops = r.work->flops / r.seconds / 1e9,
               gbs = r.work->bytes / r.seconds / 1e9, fraction = r.floor_seconds / r.seconds;
  if (json)
    std::printf(
        "%s    {\"op\": \"%s\", \"shape\": \"%s\", \"dtype\": \"%s\", \"isa\": \"%s\", "
        "\"threads\": %d, \"ms\": %.6f, \"gflops\": %.3f, \"gbs\": %.3f, \"floor_ms\": %.6f, "
        "\"bound\": \"%s\", \"fraction\": %.3f}",
        first ? "" : ",\n", r.op.c_str(), r.work->shape.c_str(), name_of(r.work->dtype),
        r.isa.c_str(), r.threads, ms, gflops, gbs, r.floor_seconds * 1e3, r.bound, fraction);
  else
    std::printf("%-24s %-30s %-5s %-8s %3d %11.4f %9.1f %8.1f %11.4f %-7s %5.0f %%\n", r.op.c_str(),
                r.work->shape.c_str(), name_of(r.work->dtype), r.isa.c_str(), r.threads, ms, gflops,
                gbs, r.floor_seconds * 1e3, r.bound, 100 * fraction);
  std::fflush(stdout);
}

int run(const Options& o) {
  if (o.list) {
    for (const OpKernel& op : op_kernels()) std::printf("%-24s %s\n", op.name, op.isa());
    return 0;
  }
  set_pool(thread_pool(*std::max_element(o.threads.begin(), o.threads.end())));
  if (o.json) std::printf("{\n  \"version\": \"" EFFINFER_VERSION "\",\n  \"ceilings\": [\n");
  std::map<std::pair<std::string, int>, Ceilings> ceilings;
  for (const auto& isa : o.isas)
    for (int threads : o.threads) {
      set_isa_cap(isa.c_str());
      const Ceilings c = ceilings[{isa, threads}] = measure_ceilings(threads);
      print_ceilings(isa, c, o.json, isa == o.isas.back() && threads == o.threads.back());
    }
  if (o.json) std::printf("  ],\n  \"rows\": [\n");
  if (!o.json && !o.ceilings)
    std::printf("\n%-24s %-30s %-5s %-8s %3s %11s %9s %8s %11s %-7s %7s\n", "op", "shape", "dtype",
                "isa", "thr", "ms", "GFLOP/s", "GB/s", "floor ms", "bound", "reached");
  bool first = true;
  for (const Op& op : registered()) {
    if (o.ceilings || !wanted(o, op)) continue;
    for (const Case& work : op.cases()) {
      if (!wanted(o, work)) continue;
      for (const auto& isa : o.isas)
        for (int threads : o.threads) {
          set_isa_cap(isa.c_str());
          set_num_threads(threads);
          const Ceilings& c = ceilings[{isa, threads}];
          const bool cached = work.bytes < kCacheBytes;
          const double memory = work.bytes / ((cached ? c.cache_gbs : c.best_read_gbs) * 1e9);
          const double compute = work.flops / peak(c, work.peak);
          const double seconds = median_seconds(work.run, o.seconds);
          print_row({op.name, isa, &work, threads, seconds, std::max(memory, compute),
                     compute > memory ? "compute"
                     : cached         ? "cache"
                                      : "memory"},
                    o.json, first);
          first = false;
        }
    }
  }
  if (o.json) std::printf("\n  ]\n}\n");
  return 0;
}

}  // namespace
}  // namespace effinfer::bench

int main(int argc, char** argv) {
  if (const char* name = effinfer::isa_env_error()) {
    std::fprintf(stderr, "effinfer-bench: EFFINFER_ISA names no instruction set: '%s'\n", name);
    return 2;
  }
  return effinfer::bench::run(effinfer::bench::parse(argc, argv));
}
