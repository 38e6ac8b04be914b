using System.Diagnostics;

[assembly: Xunit.v3.Parallelization(Mode = Xunit.Sdk.ParallelMode.None)]

namespace Rollout.Perf.Tests;

/// <summary>
/// Times variants against each other on a shared machine. Every round runs each variant once, and a variant's time is its best round: noise
/// only ever adds time, so the minimum is what the variant itself costs, and the ratio of two minima is stable where an absolute time, or a
/// mean, is not. Time is processor time, which does not pass while another process has the core; so kernels measured here get one thread.
/// </summary>
internal static class Rounds
{
    private const int WarmUp = 2;
    private const int Least = 12;
    private static readonly TimeSpan s_longest = TimeSpan.FromSeconds(15);

    /// <summary>
    /// Seconds of each variant's best round. There are at least twelve; while <paramref name="hold"/> says that the times do not pass, more
    /// rounds look for better ones, for fifteen seconds. A real slowdown remains too slow.
    /// </summary>
    public static double[] Best(Func<double[], bool> hold, params Action[] variants)
    {
        double[] best = new double[variants.Length];
        Array.Fill(best, double.PositiveInfinity);
        long begun = Stopwatch.GetTimestamp();
        for (int round = -WarmUp; round < Least || (!hold(best) && Stopwatch.GetElapsedTime(begun) < s_longest); round++)
        {
            TestContext.Current.CancellationToken.ThrowIfCancellationRequested();
            for (int i = 0; i < variants.Length; i++)
            {
                TimeSpan start = Environment.CpuUsage.TotalTime;
                variants[i]();
                double seconds = (Environment.CpuUsage.TotalTime - start).TotalSeconds;
                if (round >= 0) best[i] = Math.Min(best[i], seconds);
            }
        }

        return best;
    }
}
