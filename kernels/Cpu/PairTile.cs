using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Rollout.Kernels;

/// <summary>What one tile of bf16 pairs works on. Its layout is known to <see cref="PairTileCode"/>.</summary>
[StructLayout(LayoutKind.Sequential)]
internal unsafe struct PairTileArguments
{
    /// <summary>[pairs][height][2] bf16.</summary>
    public ushort* Activations;

    /// <summary>[pairs][32][2] bf16.</summary>
    public byte* Panel;

    /// <summary>[height][32], written.</summary>
    public float* Sums;

    public long Pairs;
}

/// <summary>
/// The tile in AVX512-BF16, which does 32 multiply-adds an instruction, twice what fp32 does; .NET 10 has no intrinsic for it. Its
/// arithmetic is that of two fused multiply-adds, the odd input first; products of two bf16 are exact in fp32.
/// </summary>
internal static class PairTileCode
{
    /// <summary>Bytes by which weights are prefetched: further than the hardware does, and on into the next panel.</summary>
    private const int Ahead = 4096;

    /// <summary>AVX512-BF16: leaf 7.1, EAX bit 5.</summary>
    public static bool IsSupported { get; } = MachineCode.IsSupported && (X86Base.CpuId(7, 1).Eax & (1 << 5)) != 0;

    public static byte[] Assemble(int rows)
    {
        Assembler c = new(64);
        Label next = c.CreateLabel();
        AssemblerRegisterZMM low = zmm31, high = zmm30, broadcast = zmm29;
        AssemblerRegister64 activations = rsi, panel = rdx, sums = rcx, pairs = r8;
        c.mov(activations, Field(nameof(PairTileArguments.Activations)));
        c.mov(panel, Field(nameof(PairTileArguments.Panel)));
        c.mov(sums, Field(nameof(PairTileArguments.Sums)));
        c.mov(pairs, Field(nameof(PairTileArguments.Pairs)));
        for (int a = 0; a < 2 * rows; a++)
            c.vpxord(Zmm(a), Zmm(a), Zmm(a));

        c.Label(ref next);
        c.vmovdqu64(low, __zmmword_ptr[panel]);
        c.vmovdqu64(high, __zmmword_ptr[panel + 64]);
        c.prefetcht0(__byte_ptr[panel + Ahead]);
        c.prefetcht0(__byte_ptr[panel + (Ahead + 64)]);
        for (int r = 0; r < rows; r++)
        {
            c.vpbroadcastd(broadcast, __dword_ptr[activations + (4 * r)]);
            c.vdpbf16ps(Zmm(2 * r), low, broadcast);
            c.vdpbf16ps(Zmm((2 * r) + 1), high, broadcast);
        }

        c.add(panel, LanePanels.LineBytes);
        c.add(activations, 4 * rows);
        c.dec(pairs);
        c.jne(next);
        for (int a = 0; a < 2 * rows; a++)
            c.vmovups(__zmmword_ptr[sums + (64 * a)], Zmm(a));
        c.vzeroupper();
        c.ret();

        using MemoryStream code = new();
        c.Assemble(new StreamCodeWriter(code), rip: 0);
        return code.ToArray();

        static AssemblerMemoryOperand Field(string name) => __qword_ptr[rdi + (int)Marshal.OffsetOf<PairTileArguments>(name)];
    }

    /// <summary>zmm0 to zmm31 by number.</summary>
    public static AssemblerRegisterZMM Zmm(int number) => new(Register.ZMM0 + number);
}

/// <summary>The same tile in C#, by fused multiply-adds; for machines without the instruction.</summary>
internal abstract unsafe class PairTile
{
    public static PairTile Of(int vectorBits) => vectorBits switch
    {
        512 => new PairTile<Wide512>(),
        256 => new PairTile<Wide256>(),
        _ => new PairTile<Wide128>(),
    };

    public abstract void Run(int height, in PairTileArguments arguments);
}

internal sealed unsafe class PairTile<TVector> : PairTile
    where TVector : unmanaged, IVector<TVector>
{
    public override void Run(int height, in PairTileArguments a)
    {
        for (int lane = 0; lane < PanelLayout.Width; lane += TVector.Width)
        {
            int row = 0;
            for (; row + 4 <= height; row += 4)
                Four(row, height, (int)a.Pairs, a.Activations, a.Panel + (4 * lane), a.Sums + lane);
            for (; row < height; row++)
                One(row, height, (int)a.Pairs, a.Activations, a.Panel + (4 * lane), a.Sums + lane);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Four(int row, int height, int pairs, ushort* activations, byte* lanes, float* sums)
    {
        TVector a0 = TVector.Create(0f), a1 = a0, a2 = a0, a3 = a0;
        ushort* x = activations + (2 * row);
        for (int p = 0; p < pairs; p++, x += 2 * height, lanes += LanePanels.LineBytes)
        {
            TVector.LoadPair((ushort*)lanes, out TVector even, out TVector odd);
            a0 = Add(a0, even, odd, x);
            a1 = Add(a1, even, odd, x + 2);
            a2 = Add(a2, even, odd, x + 4);
            a3 = Add(a3, even, odd, x + 6);
        }

        TVector.Store(sums + (row * PanelLayout.Width), a0);
        TVector.Store(sums + ((row + 1) * PanelLayout.Width), a1);
        TVector.Store(sums + ((row + 2) * PanelLayout.Width), a2);
        TVector.Store(sums + ((row + 3) * PanelLayout.Width), a3);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void One(int row, int height, int pairs, ushort* activations, byte* lanes, float* sums)
    {
        TVector a = TVector.Create(0f);
        ushort* x = activations + (2 * row);
        for (int p = 0; p < pairs; p++, x += 2 * height, lanes += LanePanels.LineBytes)
        {
            TVector.LoadPair((ushort*)lanes, out TVector even, out TVector odd);
            a = Add(a, even, odd, x);
        }

        TVector.Store(sums + (row * PanelLayout.Width), a);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static TVector Add(TVector sum, TVector even, TVector odd, ushort* x) =>
        TVector.Fma(TVector.Create(PanelLayout.ToSingle(x[0])), even, TVector.Fma(TVector.Create(PanelLayout.ToSingle(x[1])), odd, sum));
}
