using ScottPlot;
using ScottPlot.Plottables;

namespace Rollout.Examples.Grpo;

/// <summary>The plot of a run: reward and held-out accuracy on the left axis, KL on the right.</summary>
public static class LearningCurve
{
    public static void Save(
        string path, int seed, IReadOnlyList<StepReport> steps, IReadOnlyList<(int Step, double Accuracy)> heldOut)
    {
        PlotFont.Install();
        using Plot plot = new();
        double[] x = steps.Select(s => (double)s.Step).ToArray();
        (Color blue, Color orange, Color green) = (Color.FromHex("#1f77b4"), Color.FromHex("#ff7f0e"), Color.FromHex("#2ca02c"));

        Scatter raw = plot.Add.Scatter(x, steps.Select(s => s.Reward).ToArray(), blue.WithAlpha(.3));
        (raw.MarkerSize, raw.LineWidth) = (0, 1);
        Scatter smooth = plot.Add.Scatter(x, Smooth(steps.Select(s => s.Reward)), blue);
        (smooth.MarkerSize, smooth.LineWidth, smooth.LegendText) = (0, 3, "mean reward, sampled");
        Scatter held = plot.Add.Scatter(heldOut.Select(h => (double)h.Step).ToArray(), heldOut.Select(h => h.Accuracy).ToArray(), green);
        (held.MarkerSize, held.LineWidth, held.LinePattern, held.LegendText) =
            (9, 1.5f, LinePattern.Dotted, "held-out accuracy, greedy");
        Scatter kl = plot.Add.Scatter(x, Smooth(steps.Select(s => s.Stats.Kl)), orange);
        (kl.MarkerSize, kl.LineWidth, kl.LegendText) = (0, 2, "KL from warm start (right axis)");
        kl.Axes.YAxis = plot.Axes.Right;

        plot.Title($"GRPO on two-digit addition, seed {seed}");
        plot.XLabel("step");
        plot.YLabel("reward, accuracy");
        plot.Axes.Right.Label.Text = "KL, nats a token";
        LabelStyle[] labels = [plot.Axes.Bottom.Label, plot.Axes.Left.Label, plot.Axes.Right.Label, plot.Axes.Title.Label];
        foreach (LabelStyle label in labels)
            (label.FontSize, label.Bold) = (18, false);
        foreach (IAxis axis in (IAxis[])[plot.Axes.Bottom, plot.Axes.Left, plot.Axes.Right])
            axis.TickLabelStyle.FontSize = 14;
        HorizontalLine goal = plot.Add.HorizontalLine(0.9, 1, Colors.Gray, LinePattern.Dashed);
        goal.EnableAutoscale = false;
        plot.Axes.Left.TickGenerator = new ScottPlot.TickGenerators.NumericFixedInterval(0.1);
        plot.Axes.SetLimits(-0.01 * x[^1], 1.01 * x[^1], 0, 1.02);
        plot.Axes.SetLimitsY(0, Math.Max(0.1, 1.1 * steps.Max(s => s.Stats.Kl)), plot.Axes.Right);
        plot.Legend.FontSize = 15;
        plot.ShowLegend(Alignment.MiddleRight);
        plot.SavePng(path, 1200, 700);
    }

    private static double[] Smooth(IEnumerable<double> values)
    {
        double[] all = values.ToArray();
        return [.. all.Select((_, i) => all[Math.Max(0, i - 4)..(i + 1)].Average())];
    }
}
