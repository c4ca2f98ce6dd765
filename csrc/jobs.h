/*
 * Jobs: what threads without the GIL do beside the caller. They run no Python code, and no exception of a
 * signal handler's can come to them.
 *
 *   QUEUED ──a worker──► RUNNING ──► DONE
 *      └──drop()──► DROPPED
 *
 * A Job that is let go of while it runs is waited for: what a job writes to is nobody else's before.
 */
#ifndef GDSDIRECT_JOBS_H
#define GDSDIRECT_JOBS_H

#include "module.h"

enum job_state { JOB_QUEUED, JOB_RUNNING, JOB_DONE, JOB_DROPPED };

struct job_kind {
    void (*run)(void *data);         /* without the GIL */
    PyObject *(*result)(void *data); /* once it has run */
    void (*clear)(void *data);       /* with the GIL; frees `data` too */
};

/* A Job of this kind, on its way. It has `data` from then on, also where this fails. */
PyObject *gdsdirect_job(PyObject *module, const struct job_kind *kind, void *data);

extern PyType_Spec gdsdirect_job_spec;

#endif
