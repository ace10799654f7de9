// An intrusive list: an element is in it, or leaves it, in O(1) and without allocation.
#pragma once

namespace effinfer::engine {

template <class T>
struct Link {
  T* before = nullptr;
  T* after = nullptr;
};

template <class T, Link<T> T::* kLink>
class List {
 public:
  T* front() const { return front_; }
  static T* next(const T* element) { return (element->*kLink).after; }

  void push_back(T* element) {
    element->*kLink = {back_, nullptr};
    (back_ ? (back_->*kLink).after : front_) = element;
    back_ = element;
  }

  void remove(T* element) {
    const Link<T> link = element->*kLink;
    (link.before ? (link.before->*kLink).after : front_) = link.after;
    (link.after ? (link.after->*kLink).before : back_) = link.before;
  }

 private:
  T* front_ = nullptr;
  T* back_ = nullptr;
};

}  // namespace effinfer::engine
