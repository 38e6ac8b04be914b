using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// Panels for instructions that multiply and add inside 32-bit lanes: panel p holds, for each group of inputs that one lane takes (four
/// int8, two bf16), two cache lines, 32 lanes, lane j being output 32p + j.
/// </summary>
internal static unsafe class LanePanels
{
    public const int Width = PanelLayout.Width;

    /// <summary>Bytes of a panel's two lines.</summary>
    public const int LineBytes = Width * sizeof(uint);

    public static long PanelBytes(int groups) => (long)groups * LineBytes;

    /// <summary>Rows [first, end) of one panel, in scratch, to their lanes.</summary>
    public static void Store(in Scratch scratch, int groups, int first, int end, byte* panel)
    {
        uint* lanes = (uint*)panel;
        int g = 0;
        if (Avx512F.IsSupported && end - first == Width)
        {
            for (; g + 16 <= groups; g += 16)
            {
                Transpose16.Store(scratch.Row(0) + g, scratch.Stride, lanes + ((long)g * Width), Width);
                Transpose16.Store(scratch.Row(16) + g, scratch.Stride, lanes + ((long)g * Width) + 16, Width);
            }
        }

        for (; g < groups; g++)
        {
            for (int r = first; r < end; r++)
                lanes[((long)g * Width) + r] = scratch.Row(r)[g];
        }
    }

    /// <summary>Non-temporal stores are not ordered with the later stores by which the caller signals that it is done.</summary>
    public static void Fence()
    {
        if (Sse.IsSupported)
            Sse.StoreFence();
    }

    /// <summary>A panel's rows before they are transposed, and one row's values as bf16; kept by each thread that packs.</summary>
    public readonly ref struct Scratch
    {
        [ThreadStatic]
        private static NativeBuffer? s_buffer;

        public Scratch(int inputs, int groups)
        {
            // An odd number of cache lines, so that the rows of a transpose do not fall into the same sets.
            Stride = (((groups + 15) / 16) | 1) * 16;
            long bytes = ((long)Width * Stride * sizeof(uint)) + (((long)inputs + 4) * sizeof(ushort));
            if (s_buffer == null || s_buffer.Bytes < bytes)
            {
                s_buffer?.Dispose();
                s_buffer = new NativeBuffer(bytes);
            }
        }

        /// <summary>Lanes from one row to the next.</summary>
        public int Stride { get; }

        /// <summary>[inputs + 4].</summary>
        public ushort* Values => (ushort*)Row(Width);

        public uint* Row(int row) => (uint*)s_buffer!.Pointer + ((long)row * Stride);
    }
}
