// The requests that wait: by priority, then in order of arrival; but the oldest of all is overtaken
// by later arrivals at most kMaxOvertaken times, whether they are smaller or more urgent.
#pragma once
#include <functional>
#include <map>

#include "engine/request.h"

namespace effinfer::engine {

class RequestQueue {
 public:
  static constexpr int kMaxOvertaken = 8;

  int size() const { return size_; }
  int64_t tokens() const { return tokens_; }
  Request* oldest() const { return arrivals_.front(); }
  static Request* next(const Request* request) { return Arrivals::next(request); }

  void push(Request* request) {
    request->serial = ++arrived_;
    arrivals_.push_back(request);
    levels_[request->priority].push_back(request);
    ++size_;
    tokens_ += request->total;
  }

  void remove(Request* request) {
    arrivals_.remove(request);
    const auto level = levels_.find(request->priority);
    level->second.remove(request);
    if (!level->second.front()) levels_.erase(level);
    --size_;
    tokens_ -= request->total;
  }

  // Offers requests in turn to `start` until it takes one, which leaves the queue; null when it
  // takes none of those that may go now. How many are offered is bounded: it costs time.
  template <class Start>
  Request* admit(Start&& start) {
    Request* oldest = arrivals_.front();
    if (!oldest) return nullptr;
    if (oldest->overtaken >= kMaxOvertaken) return start(oldest) ? leave(oldest) : nullptr;
    int offers = 0;
    for (const auto& [priority, level] : levels_)
      for (Request* request = level.front(); request; request = Level::next(request)) {
        if (start(request)) {
          if (request != oldest) ++oldest->overtaken;
          return leave(request);
        }
        if (++offers == kMaxOvertaken) return nullptr;
      }
    return nullptr;
  }

 private:
  using Arrivals = List<Request, &Request::arrival>;
  using Level = List<Request, &Request::level>;
  Request* leave(Request* request) {
    remove(request);
    return request;
  }

  Arrivals arrivals_;
  std::map<int, Level, std::greater<int>> levels_;
  int size_ = 0;
  int64_t tokens_ = 0;
  int64_t arrived_ = 0;
};

}  // namespace effinfer::engine
