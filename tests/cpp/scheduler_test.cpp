#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>

namespace effinfer::engine {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

Config small() {
  return {.max_slots = 4,
          .max_rows = 8,
          .prefill_chunk = 4,
          .block_size = 4,
          .num_blocks = 32,
          .max_positions = 32,
          .costs = {},
          .head_costs = {}};
}

TEST(ListTest, ElementsLeaveInAnyOrder) {
  List<Request, &Request::arrival> list;
  Request a, b, c;
  for (Request* r : {&a, &b, &c}) list.push_back(r);
  list.remove(&b);
  EXPECT_EQ(list.front(), &a);
  EXPECT_EQ(list.next(&a), &c);
  list.remove(&a);
  list.remove(&c);
  EXPECT_EQ(list.front(), nullptr);
}

TEST(ArenaTest, RowsComeBackLinked) {
  Arena arena(5);
  const int rows = arena.take(3), one = arena.take(1);
  EXPECT_EQ(arena.free(), 1);
  int count = 0;
  for (int row = rows; row >= 0; row = arena.next(row)) ++count;
  EXPECT_EQ(count, 3);
  arena.give(rows);
  arena.give(one);
  EXPECT_EQ(arena.free(), 5);
}

TEST(BlockPoolTest, TheSameTokensAfterAnotherPrefixAreAnotherBlock) {
  BlockPool pool(3, 2);
  const int32_t ab[] = {1, 2}, cd[] = {3, 4};
  const int first = pool.take(), second = pool.take(), third = pool.take();
  const uint64_t a = pool.publish(first, 0, ab);
  const uint64_t after_a = pool.publish(second, a, cd);
  EXPECT_EQ(pool.find(0, ab), first);
  EXPECT_EQ(pool.find(a, cd), second);
  EXPECT_EQ(pool.find(0, cd), -1);
  EXPECT_EQ(pool.publish(third, a, cd), after_a) << "content that is cached already";
  EXPECT_EQ(pool.cached(), 2);
}

TEST(BlockPoolTest, ForgetsWhatWasReleasedFirst) {
  BlockPool pool(2, 1);
  const int32_t one = 1, two = 2;
  const int a = pool.take(), b = pool.take();
  const uint64_t prefix = pool.publish(a, 0, &one);
  pool.publish(b, prefix, &two);
  pool.unref(b);  // the end of a prefix first
  pool.unref(a);
  EXPECT_EQ(pool.available(), 2);
  EXPECT_EQ(pool.take(), b);
  EXPECT_EQ(pool.find(prefix, &two), -1);
  EXPECT_EQ(pool.find(0, &one), a);
  pool.ref(a);
  EXPECT_EQ(pool.available(), 0);
  pool.check({1, 1});
}

TEST(StatePoolTest, ASnapshotInUseIsKept) {
  StatePool pool(2);
  const Tokens tokens(new int32_t[3]{1, 2, 3});
  const int a = pool.take(), b = pool.take();
  pool.publish(a, tokens, 2);
  pool.publish(b, tokens, 3);
  pool.unref(b);
  EXPECT_EQ(pool.find(tokens.get(), 3).slot, b);
  EXPECT_EQ(pool.find(tokens.get(), 2).slot, a);
  EXPECT_EQ(pool.take(), b) << "the only one that nobody reads";
  EXPECT_EQ(pool.find(tokens.get(), 3).slot, a);
  EXPECT_EQ(pool.available(), 0);
}

TEST(RequestQueueTest, TheOldestIsOvertakenEightTimes) {
  RequestQueue queue;
  std::vector<Request> requests(12);
  for (Request& r : requests) queue.push(&r);
  const auto all_but_the_first = [&](Request* r) { return r != &requests[0]; };
  for (int i = 1; i <= RequestQueue::kMaxOvertaken; ++i)
    EXPECT_EQ(queue.admit(all_but_the_first), &requests[i]);
  EXPECT_EQ(queue.admit(all_but_the_first), nullptr);
  EXPECT_EQ(queue.admit([](Request*) { return true; }), &requests[0]);
  EXPECT_EQ(queue.admit(all_but_the_first), &requests[9]);
}

TEST(DraftControllerTest, ComputeBoundTakesNoDrafts) {
  Config config = small();
  for (int n = 1; n <= config.max_rows; ++n) config.costs.push_back(n);
  DraftController controller(config);
  controller.begin(2);
  for (int i = 0; i < 4; ++i) controller.offer(0.95);
  controller.choose(6);
  EXPECT_FALSE(controller.take(0.95));
}

TEST(DraftControllerTest, MemoryBoundTakesWhatHasRoom) {
  Config config = small();
  config.costs.assign(config.max_rows, 1.);
  DraftController controller(config);
  controller.begin(6);
  for (const double worth : {0.9, 0.2, 0.9}) controller.offer(worth);
  controller.choose(2);
  EXPECT_TRUE(controller.take(0.9));
  EXPECT_FALSE(controller.take(0.2));
  EXPECT_TRUE(controller.take(0.9));
  EXPECT_FALSE(controller.take(0.9)) << "no more than there was room for";
}

TEST(NgramTest, ProposesWhatFollowedLastTime) {
  Ngram ngram;
  ngram.enable();
  const int32_t tokens[] = {5, 6, 7, 8, 5, 6, 7};
  for (int at = 1; at < 6; ++at) EXPECT_EQ(ngram.append(tokens, at), -1);
  EXPECT_EQ(ngram.match(), 2);
  EXPECT_EQ(ngram.append(tokens, 6), 1);
  EXPECT_EQ(ngram.match(), 3);
}

TEST(SchedulerTest, RefusesAConfigurationThatCannotWork) {
  for (auto spoil : std::vector<void (*)(Config&)>{
           [](Config& c) { c.loops = 0; }, [](Config& c) { c.r_min = 2; },
           [](Config& c) { c.max_rows = 0; }, [](Config& c) { c.num_blocks = 0; },
           [](Config& c) { c.has_kv = false; }, [](Config& c) { c.max_ngram = 3; },
           [](Config& c) { c.mode = Mode::lossless; }, [](Config& c) { c.costs = {1}; }}) {
    Config config = small();
    spoil(config);
    EXPECT_THROW(Scheduler{config}, std::invalid_argument);
  }
}

// Tokens and exits are noise here: nothing may break whatever a model says.
void run_noise(unsigned seed) {
  std::mt19937 rng(seed);
  const auto below = [&](int n) { return static_cast<int>(rng() % n); };
  Config c = small();
  c.loops = 1 + below(4);
  c.r_min = 1 + below(c.loops);
  c.mode = Mode(below(3));
  c.kv_policy = KvPolicy(below(4));
  c.max_rows = 1 + below(8);
  c.max_ngram = c.loops == 1 ? below(3) : 0;
  c.num_states = below(2) ? 0 : 12;
  c.has_kv = c.num_states == 0 || below(2);
  for (int n = 0; n < c.max_rows; ++n) c.costs.push_back(1 + 0.1 * n);
  Scheduler s(c);
  int64_t ids = 0, ended = 0;
  const auto count = [&] {
    for (int i = 0; i < s.launch().events.count; ++i)
      ended += s.launch().events.data[i][3] != kToken;
  };
  const auto tick = [&](double now) {
    const int rows = s.plan(now);
    count();
    if (below(8) == 0) s.end(ids - below(4), kCancelled);
    if (rows == 0) return false;
    std::vector<int32_t> tokens(s.launch().wanted.count);
    std::vector<uint8_t> exits(tokens.size());
    for (int32_t& token : tokens) token = below(3);
    for (uint8_t& exit : exits) exit = below(2);
    s.commit(tokens.data(), exits.data(), now);
    count();
    return true;
  };
  for (int i = 0; i < 400; ++i) {
    if (below(4) == 0) {
      const std::vector<int32_t> prompt(1 + below(20), below(2));
      s.submit(++ids, prompt.data(), prompt.size(), 1 + below(12), {}, below(2),
               below(4) ? kNever : i + below(20), 1, s.config().loops);
    }
    tick(i);
    s.check();
  }
  while (tick(400) || s.queue().size() > 0 || s.running() > 0) s.check();
  EXPECT_EQ(ended, ids);
  EXPECT_EQ(s.blocks().available(), s.blocks().size());
  EXPECT_EQ(s.states().available(), s.states().size());
}

TEST(SchedulerTest, SurvivesNoise) {
  for (unsigned seed = 0; seed < 60; ++seed) run_noise(seed);
}

}  // namespace
}  // namespace effinfer::engine
