/*
 * What is handed out, one after another, leaves in one step: between the moment that it is taken from where
 * it is and the moment that the caller has it, no bytecode runs, and so no exception can come.
 *
 *   Turn      runs a function while no other thread runs one
 *   Then      awaits a coroutine, and gives what a function then has
 *   Handout   an iterator, for `for` and `async for`, over what its `_prepare` makes ready
 *   Slots     places of a buffer, each a Slot's for as long as that lives
 */
#include "handout.h"

#include <structmember.h>
#include <unistd.h>

/* ---- Turn -------------------------------------------------------------------------------- */

/* A lock that no exception leaves locked. A thread that has it, and comes again, goes on: a signal handler
 * or a finalizer would else wait for its own thread. */
struct turn {
    PyThread_type_lock lock;
    _Atomic unsigned long owner;
    pid_t process;
};

/* Gives the turn a lock that nobody has. -1 with MemoryError. */
static int
turn_begin(struct turn *turn)
{
    PyThread_type_lock lock = PyThread_allocate_lock();
    if (lock == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    turn->lock = lock;
    turn->process = getpid();
    atomic_store(&turn->owner, 0);
    return 0;
}

static void
turn_free(struct turn *turn)
{
    if (turn->lock != NULL) {
        PyThread_free_lock(turn->lock);
    }
}

/* 1: taken; 0: this thread has it already; -1 with an exception of a signal handler's. */
static int
turn_take(struct turn *turn)
{
    const unsigned long self = PyThread_get_thread_ident();
    PyLockStatus status = PyThread_acquire_lock_timed(turn->lock, 0, 0);
    if (status != PY_LOCK_ACQUIRED && turn->process != getpid()) {
        /* A thread of the parent's may have it, and is not here to give it back. */
        if (turn_begin(turn) < 0) {
            return -1;
        }
        status = PyThread_acquire_lock_timed(turn->lock, 0, 0);
    }
    if (status != PY_LOCK_ACQUIRED && atomic_load(&turn->owner) == self) {
        return 0;
    }
    while (status != PY_LOCK_ACQUIRED) {
        Py_BEGIN_ALLOW_THREADS
        status = PyThread_acquire_lock_timed(turn->lock, -1, 1);
        Py_END_ALLOW_THREADS
        if (status == PY_LOCK_INTR && PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
    atomic_store(&turn->owner, self);
    return 1;
}

static void
turn_give(struct turn *turn)
{
    atomic_store(&turn->owner, 0);
    PyThread_release_lock(turn->lock);
}

static PyObject *
turn_run(struct turn *turn, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1) {
        PyErr_SetString(PyExc_TypeError, "give a function, and its arguments");
        return NULL;
    }
    const int taken = turn_take(turn);
    if (taken < 0) {
        return NULL;
    }
    PyObject *result = PyObject_Vectorcall(args[0], args + 1, (size_t)nargs - 1, NULL);
    if (taken) {
        turn_give(turn);
    }
    return result;
}

typedef struct {
    PyObject_HEAD
    struct turn turn;
} Turn;

static PyObject *
turn_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Turn", names)) {
        return NULL;
    }
    Turn *self = (Turn *)type->tp_alloc(type, 0);
    if (self != NULL && turn_begin(&self->turn) < 0) {
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void
turn_dealloc(Turn *self)
{
    PyTypeObject *type = Py_TYPE(self);
    turn_free(&self->turn);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *
turn_method_run(Turn *self, PyObject *const *args, Py_ssize_t nargs)
{
    return turn_run(&self->turn, args, nargs);
}

static PyMethodDef turn_methods[] = {
    {"run", FASTCALL(turn_method_run), METH_FASTCALL,
     "run(function, *args): function(*args), while no other thread is in this turn."},
    {0},
};

static PyType_Slot turn_slots[] = {
    {Py_tp_new, turn_new},
    {Py_tp_dealloc, turn_dealloc},
    {Py_tp_methods, turn_methods},
    {Py_tp_doc, "Turn()\n--\n\nRuns functions of one thread at a time."},
    {0, NULL},
};

PyType_Spec gdsdirect_turn_spec = {
    .name = "gdsdirect._uring_cmd.Turn",
    .basicsize = sizeof(Turn),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = turn_slots,
};

/* ---- Then -------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *prepare;   /* makes the coroutine; makes another one if `take` then finds nothing */
    PyObject *take;      /* returns what is there then, or NotImplemented if there is nothing */
    PyObject *coroutine; /* is being awaited; it is NULL before the first `send` */
    PyObject *iterator;  /* steps through the coroutine */
} Then;

static PyObject *
then_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"prepare", "take", NULL};
    PyObject *prepare, *take;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:Then", names, &prepare, &take)) {
        return NULL;
    }
    Then *self = (Then *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->prepare = Py_NewRef(prepare);
        self->take = Py_NewRef(take);
    }
    return (PyObject *)self;
}

static int
then_traverse(Then *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->prepare);
    Py_VISIT(self->take);
    Py_VISIT(self->coroutine);
    Py_VISIT(self->iterator);
    return 0;
}

static int
then_clear(Then *self)
{
    Py_CLEAR(self->prepare);
    Py_CLEAR(self->take);
    Py_CLEAR(self->iterator);
    Py_CLEAR(self->coroutine);
    return 0;
}

static void
then_dealloc(Then *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    then_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Makes the coroutine that is to be awaited. -1 with an exception. */
static int
then_begin(Then *self)
{
    if (self->iterator != NULL) {
        return 0;
    }
    PyObject *coroutine = PyObject_CallNoArgs(self->prepare);
    PyObject *iterator = coroutine ? PyObject_CallMethod(coroutine, "__await__", NULL) : NULL;
    if (iterator == NULL) {
        Py_XDECREF(coroutine);
        return -1;
    }
    self->coroutine = coroutine;
    self->iterator = iterator;
    return 0;
}

/* Raises StopIteration with the value. The instance is made here: else a tuple would be taken for the
 * arguments, and an exception for the instance. */
static void
then_stop(PyObject *value)
{
    PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, value);
    Py_DECREF(value);
    if (stop != NULL) {
        PyErr_SetObject(PyExc_StopIteration, stop);
        Py_DECREF(stop);
    }
}

/* The coroutine has come to its end. True: there is a value, or an exception is set; else it is to be
 * awaited anew. */
static bool
then_ended(Then *self, PyObject **value)
{
    Py_CLEAR(self->iterator);
    Py_CLEAR(self->coroutine);
    *value = PyObject_CallNoArgs(self->take);
    if (*value == Py_NotImplemented) {
        Py_DECREF(*value);
        return false;
    }
    return true;
}

static PySendResult
then_send(Then *self, PyObject *argument, PyObject **result)
{
    for (;;) {
        if (then_begin(self) < 0) {
            *result = NULL;
            return PYGEN_ERROR;
        }
        PyObject *iterator = Py_NewRef(self->iterator);
        const PySendResult sent = PyIter_Send(iterator, argument, result);
        Py_DECREF(iterator);
        if (sent != PYGEN_RETURN) {
            return sent;
        }
        Py_CLEAR(*result);
        if (then_ended(self, result)) {
            return *result != NULL ? PYGEN_RETURN : PYGEN_ERROR;
        }
        argument = Py_None;
    }
}

static PyObject *
then_result(PySendResult sent, PyObject *result)
{
    if (sent == PYGEN_RETURN) {
        then_stop(result);
        return NULL;
    }
    return result;
}

static PyObject *
then_next(Then *self)
{
    PyObject *result;
    const PySendResult sent = then_send(self, Py_None, &result);
    return then_result(sent, result);
}

static PyObject *
then_method_send(Then *self, PyObject *argument)
{
    PyObject *result;
    const PySendResult sent = then_send(self, argument, &result);
    return then_result(sent, result);
}

/* throw(exception): into the coroutine; what it makes of it is what happens. */
static PyObject *
then_throw(Then *self, PyObject *args)
{
    if (then_begin(self) < 0) {
        return NULL;
    }
    PyObject *method = PyObject_GetAttrString(self->iterator, "throw");
    PyObject *result = method ? PyObject_CallObject(method, args) : NULL;
    Py_XDECREF(method);
    if (result != NULL || !PyErr_ExceptionMatches(PyExc_StopIteration)) {
        return result;
    }
    PyErr_Clear();
    PyObject *value;
    if (!then_ended(self, &value)) {
        return then_next(self);
    }
    if (value != NULL) {
        then_stop(value);
    }
    return NULL;
}

static PyObject *
then_close(Then *self, PyObject *Py_UNUSED(ignored))
{
    if (self->iterator == NULL) {
        Py_RETURN_NONE;
    }
    return PyObject_CallMethod(self->iterator, "close", NULL);
}

static PyObject *
then_await(PyObject *self)
{
    return Py_NewRef(self);
}

static PyMethodDef then_methods[] = {
    {"send", (PyCFunction)then_method_send, METH_O, NULL},
    {"throw", (PyCFunction)then_throw, METH_VARARGS, NULL},
    {"close", (PyCFunction)then_close, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot then_slots[] = {
    {Py_tp_new, then_new},
    {Py_tp_dealloc, then_dealloc},
    {Py_tp_traverse, then_traverse},
    {Py_tp_clear, then_clear},
    {Py_tp_iter, then_await},
    {Py_tp_iternext, then_next},
    {Py_tp_methods, then_methods},
    {Py_am_await, then_await},
    {Py_am_send, then_send},
    {Py_tp_doc, "Then(prepare, take)\n--\n\n"
                "Awaits prepare(), and gives take(); again, as long as that is NotImplemented."},
    {0, NULL},
};

PyType_Spec gdsdirect_then_spec = {
    .name = "gdsdirect._uring_cmd.Then",
    .basicsize = sizeof(Then),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = then_slots,
};

/* ---- Slots ------------------------------------------------------------------------------- */

/* Each place has a count of its Slots so far: the last one made is the one that has it, and others, which an
 * exception left behind in some frame, have nothing any more. */
struct place {
    Py_ssize_t offset;
    uint32_t slots;
    bool taken;
};

typedef struct {
    PyObject_HEAD
    pthread_mutex_t lock;
    Py_ssize_t count;
    Py_ssize_t free;
    struct place *places; /* by their offsets */
    PyObject *freed;      /* called when one comes back, or NULL */
} Slots;

typedef struct {
    PyObject_HEAD
    Slots *slots;
    Py_ssize_t index;
    uint32_t number; /* of the place's Slots */
} Slot;

static int
slots_fill(Slots *self, PyObject *offsets)
{
    PyObject *tuple = PySequence_Tuple(offsets);
    if (tuple == NULL) {
        return -1;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    self->places = PyMem_Calloc((size_t)count + 1, sizeof(*self->places));
    if (self->places == NULL) {
        Py_DECREF(tuple);
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        self->places[i].offset =
            PyNumber_AsSsize_t(PyTuple_GET_ITEM(tuple, i), PyExc_OverflowError);
        if (i > 0 && self->places[i].offset <= self->places[i - 1].offset) {
            PyErr_SetString(PyExc_ValueError, "offsets must go up");
        }
    }
    self->count = self->free = count;
    Py_DECREF(tuple);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *
slots_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"offsets", NULL};
    PyObject *offsets;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Slots", names, &offsets)) {
        return NULL;
    }
    Slots *self = (Slots *)type->tp_alloc(type, 0);
    if (self != NULL) {
        pthread_mutex_init(&self->lock, NULL);
        if (slots_fill(self, offsets) < 0) {
            Py_CLEAR(self);
        }
    }
    return (PyObject *)self;
}

static int
slots_traverse(Slots *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->freed);
    return 0;
}

static int
slots_clear(Slots *self)
{
    Py_CLEAR(self->freed);
    return 0;
}

static void
slots_dealloc(Slots *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    slots_clear(self);
    PyMem_Free(self->places);
    pthread_mutex_destroy(&self->lock);
    type->tp_free(self);
    Py_DECREF(type);
}

static Py_ssize_t
slots_free_count(Slots *self)
{
    pthread_mutex_lock(&self->lock);
    const Py_ssize_t free = self->free;
    pthread_mutex_unlock(&self->lock);
    return free;
}

/* peek(most) -> [offset]: of as many as are free, `most` of them. They stay free. */
static PyObject *
slots_peek(Slots *self, PyObject *argument)
{
    const Py_ssize_t most = PyNumber_AsSsize_t(argument, PyExc_OverflowError);
    if (most == -1 && PyErr_Occurred()) {
        return NULL;
    }
    PyObject *list = PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < self->count && PyList_GET_SIZE(list) < most; i++) {
        pthread_mutex_lock(&self->lock);
        const bool taken = self->places[i].taken;
        pthread_mutex_unlock(&self->lock);
        PyObject *offset = taken ? NULL : PyLong_FromSsize_t(self->places[i].offset);
        if (!taken && (offset == NULL || PyList_Append(list, offset) < 0)) {
            Py_CLEAR(list);
        }
        Py_XDECREF(offset);
    }
    return list;
}

/* The place at this offset; -1 with ValueError. */
static Py_ssize_t
place_at(const Slots *self, PyObject *argument)
{
    const Py_ssize_t offset = PyNumber_AsSsize_t(argument, PyExc_OverflowError);
    Py_ssize_t low = 0, high = self->count;
    if (offset == -1 && PyErr_Occurred()) {
        return -1;
    }
    while (low < high) {
        const Py_ssize_t middle = low + (high - low) / 2;
        if (self->places[middle].offset < offset) {
            low = middle + 1;
        }
        else {
            high = middle;
        }
    }
    if (low == self->count || self->places[low].offset != offset) {
        PyErr_Format(PyExc_ValueError, "there is no slot at %zd", offset);
        return -1;
    }
    return low;
}

/* claim(offset) -> Slot: the place is this one's from now on, and no other's, until it is let go of. */
static PyObject *
slots_claim(Slots *self, PyObject *offset)
{
    struct module_state *module = PyType_GetModuleState(Py_TYPE(self));
    const Py_ssize_t index = place_at(self, offset);
    Slot *slot = index < 0 ? NULL : (Slot *)module->slot_type->tp_alloc(module->slot_type, 0);
    if (slot == NULL) {
        return NULL;
    }
    struct place *place = &self->places[index];
    slot->slots = (Slots *)Py_NewRef((PyObject *)self);
    slot->index = index;
    pthread_mutex_lock(&self->lock);
    slot->number = ++place->slots;
    self->free -= !place->taken;
    place->taken = true;
    pthread_mutex_unlock(&self->lock);
    return (PyObject *)slot;
}

static PyObject *
slots_get_free(Slots *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(slots_free_count(self));
}

static Py_ssize_t
slots_length(const Slots *self)
{
    return self->count;
}

static int
slot_traverse(Slot *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->slots);
    return 0;
}

/* The slot is free again. */
static void
slot_dealloc(Slot *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Slots *slots = self->slots;
    if (slots != NULL) {
        CHAOS_POINT();
        struct place *place = &slots->places[self->index];
        pthread_mutex_lock(&slots->lock);
        const bool had = place->slots == self->number;
        if (had) {
            place->taken = false;
            slots->free++;
        }
        pthread_mutex_unlock(&slots->lock);
        PyObject *freed = had ? Py_XNewRef(slots->freed) : NULL;
        if (freed != NULL && freed != Py_None) {
            PyObject *type_, *value, *traceback;
            PyErr_Fetch(&type_, &value, &traceback);
            PyObject *result = PyObject_CallNoArgs(freed);
            if (result == NULL) {
                PyErr_WriteUnraisable(freed);
            }
            Py_XDECREF(result);
            PyErr_Restore(type_, value, traceback);
        }
        Py_XDECREF(freed);
        Py_DECREF(slots);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef slots_methods[] = {
    {"peek", (PyCFunction)slots_peek, METH_O,
     "peek(most) -> [offset]: of as many as are free, `most` of them."},
    {"claim", (PyCFunction)slots_claim, METH_O,
     "claim(offset) -> Slot: the place is this one's, and no other's, while it lives."},
    {0},
};

static PyGetSetDef slots_getset[] = {
    {"free", (getter)slots_get_free, NULL, "How many are free.", NULL},
    {0},
};

static PyMemberDef slots_members[] = {
    {"freed", T_OBJECT, offsetof(Slots, freed), 0, "Called when one comes back, or None."},
    {0},
};

static PyType_Slot slots_slots[] = {
    {Py_tp_new, slots_new},
    {Py_tp_dealloc, slots_dealloc},
    {Py_tp_traverse, slots_traverse},
    {Py_tp_clear, slots_clear},
    {Py_tp_methods, slots_methods},
    {Py_tp_getset, slots_getset},
    {Py_tp_members, slots_members},
    {Py_sq_length, slots_length},
    {Py_tp_doc, "Slots(offsets)\n--\n\nPlaces of a buffer, each a Slot's for as long as it lives."},
    {0, NULL},
};

static PyType_Slot slot_slots[] = {
    {Py_tp_dealloc, slot_dealloc},
    {Py_tp_traverse, slot_traverse},
    {0, NULL},
};

PyType_Spec gdsdirect_slots_spec = {
    .name = "gdsdirect._uring_cmd.Slots",
    .basicsize = sizeof(Slots),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots_slots,
};

PyType_Spec gdsdirect_slot_spec = {
    .name = "gdsdirect._uring_cmd.Slot",
    .basicsize = sizeof(Slot),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slot_slots,
};

/* ---- Handout ----------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    struct turn turn;
    PyObject *ready; /* a deque of what is to be handed out next, exceptions at their turn */
    PyObject *slots; /* once enough of them are free, they are filled before that */
    Py_ssize_t enough;
} Handout;

static PyObject *
handout_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    Handout *self = (Handout *)type->tp_alloc(type, 0);
    if (self != NULL && turn_begin(&self->turn) < 0) {
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static int
handout_traverse(Handout *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->ready);
    Py_VISIT(self->slots);
    return 0;
}

static int
handout_clear(Handout *self)
{
    Py_CLEAR(self->ready);
    Py_CLEAR(self->slots);
    return 0;
}

static void
handout_dealloc(Handout *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0) {
        return;
    }
    PyObject_GC_UnTrack(self);
    handout_clear(self);
    turn_free(&self->turn);
    type->tp_free(self);
    Py_DECREF(type);
}

static struct module_state *
module_of(Handout *self)
{
    return PyModule_GetState(PyType_GetModuleByDef(Py_TYPE(self), &gdsdirect_uring_cmd_module));
}

/* Whether there is something to hand out, and nothing to be done before. */
static bool
handout_is_ready(Handout *self)
{
    if (self->ready == NULL || self->ready == Py_None) {
        return false;
    }
    if (self->slots != NULL && Py_IS_TYPE(self->slots, module_of(self)->slots_type) &&
        slots_free_count((Slots *)self->slots) >= self->enough) {
        return false;
    }
    const Py_ssize_t length = PyObject_Size(self->ready);
    if (length < 0) {
        PyErr_Clear();
    }
    return length > 0;
}

/* The next, or the exception that has its turn; NULL without an exception: there is nothing. */
static PyObject *
handout_pop(Handout *self)
{
    if (self->ready == NULL || self->ready == Py_None) {
        return NULL;
    }
    PyObject *ready = Py_NewRef(self->ready);
    PyObject *item = PyObject_CallMethod(ready, "popleft", NULL);
    Py_DECREF(ready);
    if (item == NULL && PyErr_ExceptionMatches(PyExc_IndexError)) {
        PyErr_Clear();
    }
    if (item != NULL && PyExceptionInstance_Check(item)) {
        PyErr_SetObject((PyObject *)Py_TYPE(item), item);
        Py_CLEAR(item);
    }
    return item;
}

static PyObject *
handout_next_in_turn(Handout *self)
{
    for (;;) {
        if (!handout_is_ready(self)) {
            PyObject *prepared = PyObject_CallMethod((PyObject *)self, "_prepare", NULL);
            if (prepared == NULL) {
                return NULL;
            }
            Py_DECREF(prepared);
        }
        PyObject *item = handout_pop(self);
        if (item != NULL || PyErr_Occurred()) {
            return item;
        }
    }
}

static PyObject *
handout_next(Handout *self)
{
    const int taken = turn_take(&self->turn);
    if (taken < 0) {
        return NULL;
    }
    PyObject *item = handout_next_in_turn(self);
    if (taken) {
        turn_give(&self->turn);
    }
    return item;
}

/* _take(): what is ready, or NotImplemented. */
static PyObject *
handout_take(Handout *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *item = handout_pop(self);
    return item != NULL || PyErr_Occurred() ? item : Py_NewRef(Py_NotImplemented);
}

static PyObject *
handout_anext(Handout *self)
{
    PyObject *prepare = PyObject_GetAttrString((PyObject *)self, "_prepare_async");
    PyObject *take = prepare ? PyObject_GetAttrString((PyObject *)self, "_take") : NULL;
    PyObject *then = take ? PyObject_CallFunctionObjArgs((PyObject *)module_of(self)->then_type,
                                                         prepare, take, NULL)
                          : NULL;
    Py_XDECREF(prepare);
    Py_XDECREF(take);
    return then;
}

static PyObject *
handout_in_turn(Handout *self, PyObject *const *args, Py_ssize_t nargs)
{
    return turn_run(&self->turn, args, nargs);
}

static PyObject *
handout_self(PyObject *self)
{
    return Py_NewRef(self);
}

static PyMethodDef handout_methods[] = {
    {"_take", (PyCFunction)handout_take, METH_NOARGS, "_take(): what is ready, or NotImplemented."},
    {"_in_turn", FASTCALL(handout_in_turn), METH_FASTCALL,
     "_in_turn(function, *args): function(*args), while no other thread asks for the next."},
    {0},
};

static PyMemberDef handout_members[] = {
    {"_ready", T_OBJECT, offsetof(Handout, ready), 0, "A deque of what is handed out next."},
    {"_slots", T_OBJECT, offsetof(Handout, slots), 0, "Slots that are filled before, or None."},
    {"_enough", T_PYSSIZET, offsetof(Handout, enough), 0, "Free ones, for that to be worth it."},
    {0},
};

static PyType_Slot handout_slots[] = {
    {Py_tp_new, handout_new},
    {Py_tp_dealloc, handout_dealloc},
    {Py_tp_traverse, handout_traverse},
    {Py_tp_clear, handout_clear},
    {Py_tp_iter, handout_self},
    {Py_tp_iternext, handout_next},
    {Py_am_aiter, handout_self},
    {Py_am_anext, handout_anext},
    {Py_tp_methods, handout_methods},
    {Py_tp_members, handout_members},
    {Py_tp_doc, "An iterator over what `_prepare` and `_prepare_async` make ready."},
    {0, NULL},
};

PyType_Spec gdsdirect_handout_spec = {
    .name = "gdsdirect._uring_cmd.Handout",
    .basicsize = sizeof(Handout),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = handout_slots,
};
