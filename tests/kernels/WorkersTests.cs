using CsCheck;

namespace Rollout.Kernels.Tests;

/// <summary>Units of a job over threads.</summary>
public sealed class WorkersTests
{
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(7)]
    public void Every_unit_is_done_once_before_run_returns(int threads)
    {
        using Workers workers = new(threads);
        CountingJob job = new();
        Gen.Select(Gen.Int[0, 300], Gen.Bool, Gen.Int[0, 300]).Sample(
            (units, parallel, slowUnit) =>
            {
                job.Done = new int[units];
                job.SlowUnit = slowUnit;
                workers.Run(job, units, parallel);
                Assert.All(job.Done, times => Assert.Equal(1, times));
            },
            iter: 1000,
            threads: 1);
    }

    [Fact]
    public void The_caller_takes_its_units_in_order_and_then_helps_from_the_other_end()
    {
        using Workers workers = new(2);
        BlockedWorkerJob job = new();
        workers.Run(job, units: 40);
        Assert.Equal(Enumerable.Range(0, 20).Concat(Enumerable.Range(21, 19).Reverse()), job.OfTheCaller);
    }

    [Theory]
    [InlineData(2)]
    [InlineData(5)]
    public void An_exception_of_any_thread_is_the_callers_and_the_next_job_runs(int threads)
    {
        using Workers workers = new(threads);
        CountingJob job = new();
        for (int failing = 0; failing < 60; failing++)
        {
            job.Done = new int[60];
            job.FailingUnit = failing;
            InvalidOperationException error = Assert.Throws<InvalidOperationException>(() => workers.Run(job, 60));
            Assert.Equal($"unit {failing}", error.Message);
            Assert.All(job.Done, times => Assert.InRange(times, 0, 1));

            job.Done = new int[60];
            job.FailingUnit = -1;
            workers.Run(job, 60);
            Assert.All(job.Done, times => Assert.Equal(1, times));
        }
    }

    private sealed class CountingJob : Job
    {
        public int[] Done = [];
        public int SlowUnit = -1;
        public int FailingUnit = -1;

        public override void Execute(int unit, int worker)
        {
            if (unit == FailingUnit)
                throw new InvalidOperationException($"unit {unit}");
            if (unit == SlowUnit)
                Thread.SpinWait(20_000);
            Interlocked.Increment(ref Done[unit]);
        }
    }

    /// <summary>The second thread stays in its first unit until the caller has finished all others.</summary>
    private sealed class BlockedWorkerJob : Job
    {
        private readonly ManualResetEventSlim _started = new();
        private readonly ManualResetEventSlim _alone = new();

        public List<int> OfTheCaller { get; } = [];

        public override void Execute(int unit, int worker)
        {
            if (worker == 1)
            {
                _started.Set();
                Assert.True(_alone.Wait(TimeSpan.FromSeconds(30)));
                return;
            }

            if (OfTheCaller.Count == 0)
                Assert.True(_started.Wait(TimeSpan.FromSeconds(30)));
            OfTheCaller.Add(unit);
            if (OfTheCaller.Count == 39)
                _alone.Set();
        }
    }
}
