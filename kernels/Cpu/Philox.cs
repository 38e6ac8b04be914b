using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>
/// Philox 4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
/// Sixteen counters at a time, or one.
/// </summary>
internal static class Philox
{
    private const int Rounds = 10;
    private const uint Multiplier0 = 0xD2511F53, Multiplier1 = 0xCD9E8D57;
    private const uint Weyl0 = 0x9E3779B9, Weyl1 = 0xBB67AE85;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Generate<TLanes>(ref TLanes c0, ref TLanes c1, ref TLanes c2, ref TLanes c3, uint key0, uint key1)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        TLanes x0 = c0, x1 = c1, x2 = c2, x3 = c3;
        TLanes m0 = TLanes.CreateBits(Multiplier0), m1 = TLanes.CreateBits(Multiplier1);
        for (int round = 0; round < Rounds; round++)
        {
            TLanes high0 = TLanes.MultiplyHigh(x0, m0), low0 = TLanes.MultiplyLow(x0, m0);
            TLanes high1 = TLanes.MultiplyHigh(x2, m1), low1 = TLanes.MultiplyLow(x2, m1);
            x0 = TLanes.Xor(TLanes.Xor(high1, x1), TLanes.CreateBits(key0));
            x2 = TLanes.Xor(TLanes.Xor(high0, x3), TLanes.CreateBits(key1));
            x1 = low1;
            x3 = low0;
            key0 += Weyl0;
            key1 += Weyl1;
        }

        c0 = x0;
        c1 = x1;
        c2 = x2;
        c3 = x3;
    }
}
