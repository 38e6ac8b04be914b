using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>The machine's measured peak rates: performance targets are ratios to these, measured in the same run.</summary>
public static unsafe class MachineLimits
{
    private const int Repetitions = 7;

    /// <summary>Fused multiply-adds in registers on all threads at once, in GFLOP/s: best of several.</summary>
    public static double MeasureFmaGflops(int threads)
    {
        using Workers workers = new(threads);
        FmaJob job = new();
        double best = 0;
        for (int i = 0; i < Repetitions; i++)
        {
            long start = Stopwatch.GetTimestamp();
            workers.Run(job, threads * FmaJob.UnitsPerThread);
            double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            best = Math.Max(best, threads * FmaJob.UnitsPerThread * (double)FmaJob.OperationsPerUnit / seconds / 1e9);
        }

        return best;
    }

    /// <summary>Reading a buffer much larger than any cache once with all threads, in 10^9 bytes per second: median of several.</summary>
    public static double MeasureReadGBps(int threads)
    {
        const long Bytes = 512L << 20;
        using NativeBuffer buffer = new(Bytes);
        new Span<byte>(buffer.Pointer, (int)Bytes).Fill(1);
        using Workers workers = new(threads);
        ReadJob job = new() { Data = buffer.Pointer };
        double[] rates = new double[Repetitions];
        for (int i = 0; i < Repetitions; i++)
        {
            long start = Stopwatch.GetTimestamp();
            workers.Run(job, (int)(Bytes / ReadJob.UnitBytes));
            rates[i] = Bytes / Stopwatch.GetElapsedTime(start).TotalSeconds / 1e9;
        }

        Array.Sort(rates);
        return rates[Repetitions / 2];
    }

    private sealed class FmaJob : Job
    {
        public const int UnitsPerThread = 20;
        private const int Loops = 100_000;
        private const int Chains = 12;

        private float _sink;

        public static long OperationsPerUnit =>
            2L * Loops * Chains * (Vector512.IsHardwareAccelerated ? 16 : Vector256.IsHardwareAccelerated ? 8 : 4);

        public override void Execute(int unit, int worker) =>
            _sink = Vector512.IsHardwareAccelerated ? Run<Wide512>() : Vector256.IsHardwareAccelerated ? Run<Wide256>() : Run<Wide128>();

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static float Run<TVector>()
            where TVector : unmanaged, IVector<TVector>
        {
            TVector x = TVector.Create(0.999f), y = TVector.Create(0.001f);
            TVector a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
            for (int n = 0; n < Loops; n++)
            {
                a = TVector.Fma(a, x, y);
                b = TVector.Fma(b, x, y);
                c = TVector.Fma(c, x, y);
                d = TVector.Fma(d, x, y);
                e = TVector.Fma(e, x, y);
                f = TVector.Fma(f, x, y);
                g = TVector.Fma(g, x, y);
                h = TVector.Fma(h, x, y);
                i = TVector.Fma(i, x, y);
                j = TVector.Fma(j, x, y);
                k = TVector.Fma(k, x, y);
                l = TVector.Fma(l, x, y);
            }

            float* lanes = stackalloc float[16];
            TVector.Store(lanes, a + b + c + d + e + f + (g + h + i + j + k + l));
            return lanes[0];
        }
    }

    private sealed class ReadJob : Job
    {
        public const int UnitBytes = 1 << 20;

        private const int Ahead = 2048;

        public byte* Data;

        private ulong _sink;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public override void Execute(int unit, int worker)
        {
            byte* p = Data + ((long)unit * UnitBytes);
            byte* end = p + UnitBytes;
            Vector512<ulong> a = default, b = default;
            for (; p < end; p += 128)
            {
                // The kernels prefetch too; without it one core waits for the hardware prefetcher at each new page.
                if (Sse.IsSupported)
                {
                    Sse.Prefetch0(p + Ahead);
                    Sse.Prefetch0(p + Ahead + 64);
                }

                a |= Vector512.Load((ulong*)p);
                b |= Vector512.Load((ulong*)(p + 64));
            }

            _sink = (a | b)[0];
        }
    }
}
