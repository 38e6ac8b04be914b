using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace Rollout.Kernels;

/// <summary>The end of a tile: sums [height][32] become outputs.</summary>
internal static unsafe class PanelSums
{
    /// <summary>output = sum (* scale) (+ bias) (+ output), in this order.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Finish(float* sums, int height, float* weightScales, in MatMulArguments arguments, int firstRow, int column)
    {
        for (int r = 0; r < height; r++)
        {
            float* output = arguments.Output + ((long)(firstRow + r) * arguments.OutputStride) + column;
            for (int o = 0; o < PanelLayout.Width; o += 16)
            {
                Vector512<float> value = Vector512.Load(sums + (r * PanelLayout.Width) + o);
                if (weightScales != null)
                    value *= Vector512.Load(weightScales + o);
                if (arguments.Bias != null)
                    value += Vector512.Load(arguments.Bias + column + o);
                if (arguments.Add)
                    value = Vector512.Load(output + o) + value;
                value.Store(output + o);
            }
        }
    }
}
