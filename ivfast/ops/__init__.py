"""One file per op: public function, reference, autograd, registration."""
